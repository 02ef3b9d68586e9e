from __future__ import annotations

import pytest

from orchestrator.failures import (
    MAX_ATTEMPTS_WITHOUT_PROGRESS,
    MAX_SAME_STEP_ERRORS,
    Action,
    Failure,
    classify,
    decide,
)
from orchestrator.messages import ExitKind, TrainerExit


def failed(kind: ExitKind, restored: int = 0, reached: int = 0) -> Failure:
    return Failure(kind=kind, rank=1, message="why", restored_step=restored, reached_step=reached)


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [
        ((ExitKind.PEER_LOST, ExitKind.KILLED), 1),
        ((ExitKind.KILLED, ExitKind.PEER_LOST, ExitKind.KILLED), 0),
        ((ExitKind.PEER_LOST, ExitKind.ERROR, ExitKind.KILLED), 1),
        ((ExitKind.ERROR, ExitKind.CONFIG), 1),
        ((ExitKind.ERROR, ExitKind.DAMAGED, ExitKind.PEER_LOST), 1),
        ((ExitKind.PEER_LOST, ExitKind.STORAGE), 1),
        ((ExitKind.PEER_LOST, ExitKind.PEER_LOST), 0),
    ],
)
def test_the_cause_is_the_end_that_explains_the_others(kinds: tuple[ExitKind, ...], rank: int) -> None:
    exits = {r: TrainerExit(kind=kind, message=f"rank {r}") for r, kind in enumerate(kinds)}
    assert classify(exits) == (rank, exits[rank])


KILLED, ERROR, NAN = ExitKind.KILLED, ExitKind.ERROR, ExitKind.NON_FINITE


@pytest.mark.parametrize(
    ("history", "action"),
    [
        ([failed(ExitKind.CONFIG)], Action.REFUSE),
        ([failed(ExitKind.DAMAGED, 5, 5)], Action.QUARANTINE),
        ([failed(KILLED)], Action.RESTART),
        ([failed(ExitKind.STORAGE)], Action.RESTART),
        ([failed(ExitKind.PEER_LOST)], Action.RESTART),
        ([failed(ERROR, 0, 7)] * (MAX_SAME_STEP_ERRORS - 1), Action.RESTART),
        ([failed(ERROR, 0, 7)] * MAX_SAME_STEP_ERRORS, Action.GIVE_UP),
        ([failed(NAN, 5, 7)] * MAX_SAME_STEP_ERRORS, Action.GIVE_UP),
        # Another step each time, or another kind in between: not the same failure again.
        ([failed(ERROR, 0, step) for step in range(MAX_SAME_STEP_ERRORS)], Action.RESTART),
        ([failed(ERROR, 0, 7), failed(KILLED, 0, 7), failed(ERROR, 0, 7), failed(ERROR, 0, 7)], Action.RESTART),
        # Without a newer checkpoint the budget ends; with one it never does.
        ([failed(KILLED, 10, 12)] * MAX_ATTEMPTS_WITHOUT_PROGRESS, Action.GIVE_UP),
        ([failed(KILLED, 10, 12)] * (MAX_ATTEMPTS_WITHOUT_PROGRESS - 1), Action.RESTART),
        ([failed(KILLED, step, step + 3) for step in range(0, 2000, 10)], Action.RESTART),
        ([failed(KILLED, 10, 12)] * 29 + [failed(KILLED, 20, 22)], Action.RESTART),
    ],
)
def test_decide(history: list[Failure], action: Action) -> None:
    assert decide(history).action is action


def test_the_reason_names_rank_and_cause() -> None:
    decision = decide([failed(ERROR, 0, 7)] * MAX_SAME_STEP_ERRORS)
    assert decision.reason == "step 8 failed 3 times in the same way; rank 1: why"


def test_waits_grow_only_where_nothing_moves() -> None:
    stuck = [decide([failed(KILLED, 10)] * n).delay_s for n in range(1, MAX_ATTEMPTS_WITHOUT_PROGRESS)]
    assert stuck[:3] == [0, 0, 0]
    assert stuck == sorted(stuck)
    assert stuck[-1] == 10.0
    assert decide([failed(KILLED, step) for step in range(20)]).delay_s == 0
