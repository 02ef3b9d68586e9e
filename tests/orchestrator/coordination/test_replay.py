from __future__ import annotations

import math

import pytest

from orchestrator.coordination.replay import ReplayCheck

LOSSES, RANKS = (0.5, 0.25, 0.125, 1.0), (0, 0, 1, 1)


def numbers(loss: float = 1.0, norm: float = 2.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": norm, "lr": 0.1}


def trained(*steps: int) -> ReplayCheck:
    check = ReplayCheck()
    check.begin_attempt(None)
    for step in steps:
        assert check.check(step, numbers(loss=step), LOSSES, RANKS) is None
    return check


def test_the_same_bits_are_no_news() -> None:
    check = trained(1, 2, 3)
    check.begin_attempt(None)
    assert check.check(2, numbers(loss=2), LOSSES, RANKS) is None
    check.begin_attempt(None)
    assert all(check.check(step, numbers(loss=step), LOSSES, RANKS) is None for step in (1, 2, 3, 4))


@pytest.mark.parametrize("loss", [2.0000000000000004, math.nan, -2.0])
def test_another_loss_is_named_once_an_attempt(loss: float) -> None:
    check = trained(1, 2, 3)
    check.begin_attempt(None)
    assert check.check(1, numbers(loss=1), LOSSES, RANKS) is None
    differs = check.check(2, numbers(loss=loss), (0.5, 0.25, 0.125, 1.5), RANKS)
    assert differs is not None and differs.step == 2 and differs.ranks == (1,)
    assert f"loss 2.0 then and {loss!r} now; first in microbatches 3 of rank 1" in differs.message
    assert check.check(3, numbers(loss=7), LOSSES, RANKS) is None, "it follows from the first"
    check.begin_attempt(None)
    assert check.check(2, numbers(loss=5), LOSSES, RANKS) is not None


def test_skipped_steps_and_nan_are_compared_as_bits() -> None:
    check = ReplayCheck()
    check.begin_attempt(None)
    for _ in range(2):
        assert check.check(1, numbers(loss=math.nan), (math.nan,), (0,)) is None
        assert check.check(2, {"skipped": 1.0}, (), ()) is None
        check.begin_attempt(None)


def test_a_gradient_alone_is_of_no_known_rank() -> None:
    check = trained(1)
    check.begin_attempt(None)
    differs = check.check(1, numbers(loss=1, norm=3.0), LOSSES, RANKS)
    assert differs is not None and differs.ranks == () and "losses of its microbatches are the same" in differs.message


def test_after_a_rollback_other_numbers_are_expected() -> None:
    check = trained(1, 2, 3)
    check.begin_attempt(unknown_from=2)
    assert check.check(2, numbers(loss=9), LOSSES, RANKS) is None
    assert check.check(3, {"skipped": 1.0}, (), ()) is None
    check.begin_attempt(None)
    assert check.check(1, numbers(loss=9), LOSSES, RANKS) is not None


RECORD = {step: numbers(loss=step) for step in (6, 7, 8)}


def test_a_new_life_compares_with_the_record() -> None:
    check = ReplayCheck()
    check.begin_attempt(None)
    assert check.learn(RECORD) is None
    assert check.check(6, numbers(loss=6), LOSSES, RANKS) is None
    differs = check.check(7, numbers(loss=7.5), LOSSES, RANKS)
    assert differs is not None and differs.ranks == () and "of which microbatch is not known" in differs.message


def test_a_record_that_is_read_late_is_compared_with_what_was_made_meanwhile() -> None:
    check = trained(6)
    assert check.check(7, numbers(loss=7.5), LOSSES, RANKS) is None
    differs = check.learn(RECORD)
    assert differs is not None and differs.step == 7 and "loss 7.0 then and 7.5 now" in differs.message
    assert check.check(8, numbers(loss=8.5), LOSSES, RANKS) is None, "it follows from the first"


def test_what_was_recorded_before_a_rollback_of_this_life_does_not_count() -> None:
    check = trained(6)
    check.begin_attempt(unknown_from=7)
    assert check.learn(RECORD) is None
    assert check.check(7, numbers(loss=9), LOSSES, RANKS) is None


def test_only_so_many_steps_are_remembered() -> None:
    check = ReplayCheck(num_steps=2)
    check.begin_attempt(None)
    for step in (1, 2, 3):
        check.check(step, numbers(), LOSSES, RANKS)
    check.begin_attempt(None)
    assert check.check(1, numbers(loss=5), LOSSES, RANKS) is None, "forgotten"
