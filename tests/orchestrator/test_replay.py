from __future__ import annotations

import math

import pytest

from orchestrator.replay import ReplayCheck

LOSSES, RANKS = (0.5, 0.25, 0.125, 1.0), (0, 0, 1, 1)


def numbers(loss: float = 1.0, norm: float = 2.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": norm, "lr": 0.1}


def trained(*steps: int) -> ReplayCheck:
    check = ReplayCheck()
    check.begin_attempt(0, None)
    for step in steps:
        assert check.check(step, numbers(loss=step), LOSSES, RANKS) is None
    return check


def test_the_same_bits_are_no_news() -> None:
    check = trained(1, 2, 3)
    check.begin_attempt(1, None)
    assert check.check(2, numbers(loss=2), LOSSES, RANKS) is None
    check.begin_attempt(0, None)
    assert all(check.check(step, numbers(loss=step), LOSSES, RANKS) is None for step in (1, 2, 3, 4))


@pytest.mark.parametrize("loss", [2.0000000000000004, math.nan, -2.0])
def test_another_loss_is_named_once_an_attempt(loss: float) -> None:
    check = trained(1, 2, 3)
    check.begin_attempt(0, None)
    assert check.check(1, numbers(loss=1), LOSSES, RANKS) is None
    differs = check.check(2, numbers(loss=loss), (0.5, 0.25, 0.125, 1.5), RANKS)
    assert differs is not None and differs.step == 2 and differs.ranks == (1,)
    assert f"loss 2.0 then and {loss!r} now; first in microbatches 3 of rank 1" in differs.message
    assert check.check(3, numbers(loss=7), LOSSES, RANKS) is None, "it follows from the first"
    check.begin_attempt(1, None)
    assert check.check(2, numbers(loss=5), LOSSES, RANKS) is not None


def test_skipped_steps_and_nan_are_compared_as_bits() -> None:
    check = ReplayCheck()
    check.begin_attempt(0, None)
    for _ in range(2):
        assert check.check(1, numbers(loss=math.nan), (math.nan,), (0,)) is None
        assert check.check(2, {"skipped": 1.0}, (), ()) is None
        check.begin_attempt(0, None)


def test_a_gradient_alone_is_of_no_known_rank() -> None:
    check = trained(1)
    check.begin_attempt(0, None)
    differs = check.check(1, numbers(loss=1, norm=3.0), LOSSES, RANKS)
    assert differs is not None and differs.ranks == () and "losses of its microbatches are the same" in differs.message


def test_after_a_rollback_other_numbers_are_expected() -> None:
    check = trained(1, 2, 3)
    check.begin_attempt(0, unknown_from=2)
    assert check.check(2, numbers(loss=9), LOSSES, RANKS) is None
    assert check.check(3, {"skipped": 1.0}, (), ()) is None
    check.begin_attempt(0, None)
    assert check.check(1, numbers(loss=9), LOSSES, RANKS) is not None


def test_a_new_life_asks_the_record() -> None:
    asked: list[int] = []

    def record(after_step: int) -> dict[int, dict[str, float]]:
        asked.append(after_step)
        return {6: numbers(loss=6), 7: numbers(loss=7)}

    check = ReplayCheck(record)
    check.begin_attempt(5, None)
    assert asked == [5]
    assert check.check(6, numbers(loss=6), LOSSES, RANKS) is None
    differs = check.check(7, numbers(loss=7.5), LOSSES, RANKS)
    assert differs is not None and differs.ranks == () and "of which microbatch is not known" in differs.message


def test_only_so_many_steps_are_remembered() -> None:
    check = ReplayCheck(num_steps=2)
    check.begin_attempt(0, None)
    for step in (1, 2, 3):
        check.check(step, numbers(), LOSSES, RANKS)
    check.begin_attempt(0, None)
    assert check.check(1, numbers(loss=5), LOSSES, RANKS) is None, "forgotten"
