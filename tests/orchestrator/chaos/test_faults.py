"""The schedule of a drill."""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.chaos.faults import Fault, FaultKind, draw, poisoned, steps_needed
from trainers.errors import ConfigError

KINDS = [FaultKind.KILL_WORKER, FaultKind.HANG, FaultKind.NAN]


def test_equal_arguments_give_equal_faults_and_other_seeds_others() -> None:
    first = draw(KINDS, 7, 3, 100, 4)
    assert first == draw(KINDS, 7, 3, 100, 4)
    assert first != draw(KINDS, 7, 4, 100, 4)


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_equally_often_at_different_steps_with_room_to_recover(seed: int) -> None:
    faults = draw(KINDS, 7, seed, 40, 3)
    counts = Counter(fault.kind for fault in faults)
    assert sorted(counts.values()) == [2, 2, 3] and set(counts) == set(KINDS)
    steps = [fault.step for fault in faults]
    assert steps == sorted(set(steps)) and steps[0] >= 2 and steps[-1] <= 32
    assert {fault.rank for fault in faults} <= {0, 1, 2}


def test_steps_are_spread_over_the_whole_run() -> None:
    steps = [fault.step for seed in range(200) for fault in draw(KINDS, 1, seed, 100, 1)]
    thirds = Counter((step - 2) * 3 // 79 for step in steps)
    assert min(thirds.values()) > 40


def test_too_short_a_run_is_refused_with_the_length_that_works() -> None:
    with pytest.raises(ConfigError, match=r"train.num_steps=10 is too short for 5 faults; give at least 14,"):
        draw(KINDS, 5, 0, 10, 1)
    assert len(draw(KINDS, 5, 0, 14, 1)) == 5


@pytest.mark.parametrize(
    ("spare", "node_steps", "needed"),
    [(0, 100, 206), (1, 100, 106), (2, 100, 10), (0, 0, 10)],
    ids=["one after the other", "two at a time", "enough for all", "nothing goes on meanwhile"],
)
def test_how_long_a_run_must_be_while_nodes_are_replaced(spare: int, node_steps: int, needed: int) -> None:
    kinds = [FaultKind.KILL_NODE, FaultKind.KILL_WORKER, FaultKind.DRAIN, FaultKind.PARTITION]
    faults = [Fault(kind=kind, step=step, rank=0) for kind, step in zip(kinds, (5, 6, 7, 9), strict=True)]
    assert steps_needed(faults, spare, node_steps) == needed


def test_poisoned_samples_are_in_the_batches_of_their_steps() -> None:
    faults = [Fault(kind=FaultKind.NAN, step=step, rank=0) for step in (1, 9)]
    faults.insert(1, Fault(kind=FaultKind.HANG, step=4, rank=0))
    first, second = poisoned(faults, 5, 8)
    assert 0 <= first < 8 and 64 <= second < 72
