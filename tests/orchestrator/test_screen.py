from __future__ import annotations

from typing import Any

import pytest

from orchestrator.messages.attempts import Event
from orchestrator.screen import Screen


def lines(*events: tuple[str, dict[str, Any]]) -> list[str]:
    written: list[str] = []
    screen = Screen(20, 16, written.append)
    for kind, fields in events:
        screen.show(Event(kind=kind, fields=fields, time_s=0.0))
    return written


FAILURE = {
    "attempt": 2,
    "rank": 1,
    "kind": "error",
    "action": "restart",
    "reason": "why",
    "details": "Trace\n",
    "step": 7,
}
WHERE = {"where": "model.py:3, in f", "microbatch": 1, "samples": [4]}


def test_a_trace_is_shown_once_and_the_three_lines_not_at_all() -> None:
    failed, other = ("failure", FAILURE | WHERE), ("failure", FAILURE | WHERE | {"details": "Another"})
    line = "attempt 2: stopped after step 7, error: why; restart"
    assert lines(failed, failed, other) == [line, "Trace", line, line, "Another"]
    last = lines(("failure", FAILURE | WHERE | {"reason": "what\nwhere: x\nsamples: y", "action": "give up"}))
    assert last[0] == "attempt 2: stopped after step 7, error: what; give up"


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        (
            "bad_step",
            {"step": 6, "numbers": "loss nan, gradient norm inf"},
            "step 6 is bad and makes no update: loss nan, gradient norm inf",
        ),
        ("started", {"host": "h", "workers": 2}, "starting: first Ray and the workers"),
        (
            "broken_samples",
            {"step": 2, "samples": ["data.path: a.png can not be read; remove it, or set data.on_broken=skip"]},
            "step 2: broken samples are replaced, 1 more, such as: data.path: a.png can not be read; remove it",
        ),
        (
            "diverged",
            {"reason": "why", "skip": [5, 9], "rollback": 2},
            "training diverged: why; rollback 2: steps 5 to 9 are left out",
        ),
        (
            "left_out",
            {"step": 3, "samples": [1, 2], "reason": "why"},
            "from step 3 on 2 samples are left out: why",
        ),
        (
            "corrupted",
            {"step": 9, "since": 6, "ranks": [2], "reason": "why"},
            "warning: what was made from step 6 on may be wrong; if it happens again, replace the node of rank 2",
        ),
        ("replay_differs", {"step": 3, "ranks": [1], "message": "other numbers"}, "warning: other numbers"),
    ],
)
def test_what_a_run_leaves_out_is_told(kind: str, fields: dict[str, Any], line: str) -> None:
    assert lines((kind, {"attempt": 1} | fields)) == [line]


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        (
            "validation",
            {"metrics": {"loss": 0.5, "loss/ema/slow": 0.25}},
            "validation  loss 0.5000  loss/ema/slow 0.2500",
        ),
        ("validation", {"metrics": {"loss": None}}, "validation  loss nan"),
        ("samples", {"title": "slow", "path": "s3://b/x.png"}, "samples of the weights slow: s3://b/x.png"),
        ("samples_lost", {"title": "raw", "error": "why"}, "samples of the weights raw could not be stored: why"),
        ("evaluated", {"seconds": 2.5}, None),
    ],
)
def test_what_an_evaluation_finds_is_told(kind: str, fields: dict[str, Any], expected: str | None) -> None:
    found = lines((kind, {"attempt": 1, "step": 6} | fields))
    assert found == ([] if expected is None else [f"step 6: {expected}"])


def test_a_step_that_is_left_out_has_no_loss() -> None:
    (line,) = lines(("step", {"attempt": 1, "step": 20, "metrics": {"skipped": 1.0}}))
    assert line.startswith("step 20/20  left out  ")


def test_a_clock_that_is_set_back_silences_nobody() -> None:
    written: list[str] = []
    screen = Screen(20, 16, written.append)
    for step, at in ((1, 9000.0), (2, 9001.0), (3, 5400.0), (4, 5401.0)):
        screen.show(Event(kind="step", fields={"attempt": 1, "step": step, "metrics": {"loss": 1.0}}, time_s=at))
    assert [line.split("/")[0] for line in written] == ["step 1", "step 3"]
