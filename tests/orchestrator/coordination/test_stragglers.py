from __future__ import annotations

import pytest

from orchestrator.coordination.stragglers import Straggler, Stragglers
from orchestrator.messages.liveness import Busy


def rounds(*step_s: tuple[float, ...]) -> list[Straggler]:
    watch = Stragglers(len(step_s[0]))
    reports = [
        watch.take(rank, Busy(attempt=1, num_steps=10, seconds=10 * seconds))
        for one in step_s
        for rank, seconds in enumerate(one)
    ]
    return [report for report in reports if report]


def test_names_a_slow_rank_once() -> None:
    assert rounds(*[(0.1, 0.25, 0.12)] * 5) == [Straggler(rank=1, step_s=0.25, others_s=pytest.approx(0.11))]


@pytest.mark.parametrize(
    "step_s",
    [
        [(0.1, 0.14)] * 5,  # uneven, as machines are
        [(0.001, 0.015)] * 5,  # many times as slow, and yet nothing
        [(0.1, 0.3), (0.1, 0.1)] * 3,  # now and then
        [(0.1, 0.3), (0.3, 0.1)] * 3,  # in turns
        [(0.3, 0.3)] * 5,  # all slow alike
        [(5.0,)] * 5,  # alone
    ],
)
def test_names_nobody(step_s: list[tuple[float, ...]]) -> None:
    assert rounds(*step_s) == []
