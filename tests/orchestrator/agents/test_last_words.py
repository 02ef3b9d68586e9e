from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from orchestrator.agents.last_words import blamed_frame, last_words
from orchestrator.messages.attempts import ExitKind
from trainers.decode import decode
from trainers.errors import ConfigError, CorruptionError, DivergedError
from trainers.progress import Progress
from trainers.trace import Blame, Place, Stage

MODEL = """
import json

def forward(x):
    return attend(x)

def attend(x):
    return json.loads(x)
"""


def raised(call: object, *arguments: object) -> BaseException:
    try:
        call(*arguments)  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_the_users_own_line_is_blamed_not_that_of_a_library(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    spec = importlib.util.spec_from_file_location("model", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert blamed_frame(raised(module.forward, "{")) == f"{file}:8, in attend"


def test_without_a_line_of_the_user_ours_is_blamed() -> None:
    error = raised(decode, Progress, {"step": "x"})
    assert error.__traceback__ is not None
    inner = error.with_traceback(error.__traceback__.tb_next)  # without this file's own frame
    assert "trainers/decode.py:" in blamed_frame(inner)
    library = raised(json.loads, "{")
    assert library.__traceback__ is not None
    assert "json/" in blamed_frame(library.with_traceback(library.__traceback__.tb_next))


def test_an_unreadable_sample_is_refused_unless_it_may_be_left_out() -> None:
    place = Place(step=3, microbatch=1, position=40, stage=Stage.DATA, blame=Blame.EXACT, samples=(7,))
    error = ConfigError("data.path: 7.png can not be read")
    assert last_words(error, place, quarantine=False).kind is ExitKind.CONFIG
    assert last_words(error, place, quarantine=True).kind is ExitKind.ERROR
    assert last_words(error, None, quarantine=True).kind is ExitKind.CONFIG


@pytest.mark.parametrize("error", [DivergedError("bad", skip=(3, 9), num_rollbacks=2)])
def test_a_divergence_says_what_to_leave_out(error: DivergedError) -> None:
    words = last_words(error, None, quarantine=False)
    assert (words.kind, words.skip, words.num_rollbacks) == (ExitKind.DIVERGED, (3, 9), 2)


def test_corruption_says_whose_state_and_since_when() -> None:
    words = last_words(CorruptionError("why", ranks=(2,), alike_step=40), None, quarantine=False)
    assert (words.kind, words.message, words.ranks, words.alike_step) == (ExitKind.CORRUPTED, "why", (2,), 40)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = raised((tmp_path / "a.png").read_bytes)
    assert str(tmp_path / "a.png") in last_words(error, None, quarantine=False).message
    assert last_words(KeyError("x"), None, quarantine=False).message == "KeyError('x')"
