"""What one coordinator has seen fail, and what it left out; and what the checkpoint says of lives before."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.catalog import CheckpointInfo, newest_stable
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.casebook import Casebook
from orchestrator.coordination.failures import Action, FailureConfig
from orchestrator.messages.attempts import ExitKind, TrainerExit
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.group import make_spec
from trainers.exclusions import Exclusions
from trainers.trace import Blame, Place, Stage


@pytest.fixture
def checkpoint() -> CheckpointInfo | None:
    """Of a run that has left out two samples."""
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    save(store, make_state(0), step=5, scalars={"exclusions": {"steps": [], "samples": [[2, 7], [2, 8]]}})
    return newest_stable(store)


@pytest.mark.parametrize(("left_out", "action"), [(4, Action.LEAVE_OUT), (3, Action.GIVE_UP)])
def test_samples_that_earlier_lives_left_out_count(
    checkpoint: CheckpointInfo | None, left_out: int, action: Action
) -> None:
    spec = make_spec("", quarantine=True, failures=FailureConfig(left_out=left_out))
    book = Casebook(spec, lambda *_, **__: None, lambda *_: None)
    assert book.learn(checkpoint) == Exclusions(samples=((2, 7), (2, 8)))
    place = Place(step=8, microbatch=0, position=70, stage=Stage.MODEL, blame=Blame.MICROBATCH, samples=(5, 17))
    end = TrainerExit(kind=ExitKind.ERROR, message="ValueError()", place=place)
    assert book.judge(1, {0: end}, restored_step=5, reached_step=7).action is Action.RESTART
    assert book.judge(2, {0: end}, restored_step=5, reached_step=7).action is action
    more = ((8, 5), (8, 17)) if action is Action.LEAVE_OUT else ()
    assert book.exclusions == Exclusions(samples=((2, 7), (2, 8), *more))
