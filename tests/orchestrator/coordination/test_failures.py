from __future__ import annotations

from typing import Any

import pytest

from orchestrator.coordination.failures import Action, Decision, Failure, FailureConfig, classify, decide
from orchestrator.messages.attempts import ExitKind, TrainerExit
from trainers.errors import ConfigError
from trainers.trace import Blame, Place, Stage

KILLED, ERROR, CRASHED, DIVERGED = ExitKind.KILLED, ExitKind.ERROR, ExitKind.CRASHED, ExitKind.DIVERGED
CONFIG = FailureConfig()


def failed(kind: ExitKind, restored: int = 0, reached: int = 0, **words: Any) -> Failure:
    end = TrainerExit(kind=kind, message="why", **words)
    return Failure(rank=1, exit=end, restored_step=restored, reached_step=reached)


def place(step: int = 8, microbatch: int = 3, samples: tuple[int, ...] = (5, 17), blame: Blame = Blame.MICROBATCH):
    return Place(step=step, microbatch=microbatch, position=60, stage=Stage.MODEL, blame=blame, samples=samples)


def judged(history: list[Failure], **changes: Any) -> Decision:
    return decide(history, FailureConfig(**changes), quarantine=False)


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [
        ((ExitKind.PEER_LOST, ExitKind.KILLED), 1),
        ((ExitKind.KILLED, ExitKind.PEER_LOST, ExitKind.KILLED), 0),
        ((ExitKind.PEER_LOST, ExitKind.ERROR, ExitKind.KILLED), 1),
        ((ExitKind.KILLED, ExitKind.CRASHED), 1),
        ((ExitKind.ERROR, ExitKind.CONFIG), 1),
        ((ExitKind.ERROR, ExitKind.DAMAGED, ExitKind.PEER_LOST), 1),
        ((ExitKind.KILLED, ExitKind.DIVERGED), 1),
        ((ExitKind.PEER_LOST, ExitKind.START), 1),
        ((ExitKind.PEER_LOST, ExitKind.STORAGE), 1),
        ((ExitKind.PEER_LOST, ExitKind.PEER_LOST), 0),
    ],
)
def test_the_cause_is_the_end_that_explains_the_others(kinds: tuple[ExitKind, ...], rank: int) -> None:
    exits = {r: TrainerExit(kind=kind, message=f"rank {r}") for r, kind in enumerate(kinds)}
    assert classify(exits) == (rank, exits[rank])


def test_of_a_corrupted_state_the_rank_is_named_that_was_outvoted() -> None:
    end = TrainerExit(kind=ExitKind.CORRUPTED, message="rank 2 differs", ranks=(2,))
    assert classify(dict.fromkeys(range(3), end)) == (2, end)
    assert judged([Failure(rank=2, exit=end, restored_step=0, reached_step=9)]).reason == "rank 2 differs"


def test_every_kind_can_be_classified_and_decided() -> None:
    for kind in ExitKind:
        assert classify({0: TrainerExit(kind=kind, message="m")})[1].kind is kind
        assert decide([failed(kind)], CONFIG, quarantine=False).reason


SAME = CONFIG.same_step


@pytest.mark.parametrize(
    ("history", "action"),
    [
        ([failed(ExitKind.CONFIG)], Action.REFUSE),
        ([failed(ExitKind.DAMAGED, 5, 5)], Action.QUARANTINE),
        ([failed(KILLED)], Action.RESTART),
        ([failed(ExitKind.STORAGE)], Action.RESTART),
        ([failed(ExitKind.PEER_LOST)], Action.RESTART),
        ([failed(DIVERGED, skip=(3, 9))], Action.ROLL_BACK),
        ([failed(ExitKind.CORRUPTED)], Action.ROLL_BACK),
        ([failed(DIVERGED, skip=(3, 9), num_rollbacks=CONFIG.rollbacks)], Action.GIVE_UP),
        ([failed(ERROR, 0, 7)] * (SAME - 1), Action.RESTART),
        ([failed(ERROR, 0, 7)] * SAME, Action.GIVE_UP),
        ([failed(CRASHED, 5, 7)] * SAME, Action.GIVE_UP),
        # Newer checkpoints and deaths in between do not make it another failure.
        ([failed(ERROR, restored, 7) for restored in range(SAME)], Action.GIVE_UP),
        (
            [failed(ERROR, 0, 7), failed(KILLED, 0, 3), failed(KILLED, 0, 7)] * SAME + [failed(ERROR, 0, 7)],
            Action.GIVE_UP,
        ),
        # Another step each time, or the run got past it: not the same failure again.
        ([failed(ERROR, 0, step) for step in range(SAME)], Action.RESTART),
        ([failed(ERROR, 0, 7), failed(ERROR, 0, 7), failed(KILLED, 0, 8), failed(ERROR, 0, 7)], Action.RESTART),
        # Kills that let the run make checkpoints never end it; damage that leads to older ones does.
        ([failed(KILLED, step, step + 3) for step in range(0, 2000, 10)], Action.RESTART),
        ([failed(KILLED, 10, 12)] * 29 + [failed(KILLED, 20, 22)], Action.RESTART),
        ([failed(ExitKind.DAMAGED, step, step) for step in range(10, 0, -1)], Action.GIVE_UP),
    ],
)
def test_decide(history: list[Failure], action: Action) -> None:
    assert decide(history, CONFIG, quarantine=False).action is action


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("errors", ERROR),
        ("errors", CRASHED),
        ("kills", KILLED),
        ("lost_peers", ExitKind.PEER_LOST),
        ("storage", ExitKind.STORAGE),
        ("damaged", ExitKind.DAMAGED),
        ("corrupted", ExitKind.CORRUPTED),
        ("starts", ExitKind.START),
    ],
)
def test_each_kind_has_its_own_budget(key: str, kind: ExitKind) -> None:
    same_budget = {ERROR, CRASHED} if key == "errors" else {kind}
    others = [failed(other, 10, 30) for other in ExitKind if other not in same_budget]
    of_kind = [failed(kind, 10, 10 + step) for step in range(4)]
    assert judged([*others, *of_kind[:3]], **{key: 4}).action is not Action.GIVE_UP
    decision = judged([*others, *of_kind], **{key: 4})
    assert decision.action is Action.GIVE_UP and f"failures.{key}=4" in decision.reason
    # With a newer checkpoint they count from one again.
    assert judged([*of_kind[:3], failed(kind, 20, 25)], **{key: 4}).action is not Action.GIVE_UP


def test_a_bug_is_told_in_three_lines() -> None:
    error = failed(ERROR, 0, 7, frame="/home/me/model.py:42, in forward", place=place())
    assert decide([error] * SAME, CONFIG, quarantine=False).reason.splitlines() == [
        "step 8 failed 3 times in the same way; rank 1: why",
        "where: /home/me/model.py:42, in forward",
        "samples: microbatch 3 of step 8, from position 60: dataset indices 5, 17",
    ]
    early = failed(ERROR, frame="/home/me/model.py:3, in __init__")
    assert decide([early] * SAME, CONFIG, quarantine=False).reason.splitlines()[1:] == [
        "where: /home/me/model.py:3, in __init__",
        "samples: none, no microbatch was worked on",
    ]


def at(where: Place, kind: ExitKind = ERROR) -> Failure:
    return failed(kind, 0, where.step - 1, place=where)


EXACT = place(samples=(5,), blame=Blame.EXACT)


@pytest.mark.parametrize(
    ("history", "action"),
    [
        ([at(place())], Action.RESTART),
        ([at(place())] * 2, Action.LEAVE_OUT),
        ([at(place(), KILLED)] * 2, Action.LEAVE_OUT),
        ([at(place(), CRASHED), at(place(step=4), KILLED), at(place(), CRASHED)], Action.LEAVE_OUT),
        ([at(place()), at(place(microbatch=0)), at(place())], Action.LEAVE_OUT),
        ([at(place()), failed(KILLED, 0, 8), at(place())], Action.RESTART),  # it got past that step
        # With other samples in their place it fails all the same: they were not to blame.
        ([at(place()), at(place()), at(place(samples=(6, 18)))], Action.RESTART),
        ([at(place()), at(place()), at(place(samples=(6, 18))), at(place(samples=(6, 18)))], Action.GIVE_UP),
        # But if it is known which one can not be read, its replacement may be unreadable too.
        ([at(EXACT), at(EXACT), *[at(place(samples=(6,), blame=Blame.EXACT))] * 2], Action.LEAVE_OUT),
        # None of them can be read, or all of them alone: not the samples' fault.
        ([at(place(blame=Blame.NONE))] * 2, Action.RESTART),
        ([at(place(blame=Blame.NONE))] * 3, Action.GIVE_UP),
        ([failed(ERROR, 0, 7)] * 3, Action.GIVE_UP),
    ],
)
def test_a_sample_that_kills_twice_is_left_out(history: list[Failure], action: Action) -> None:
    assert decide(history, CONFIG, quarantine=True).action is action
    assert decide(history, CONFIG, quarantine=False).action is not Action.LEAVE_OUT


def test_no_more_samples_are_left_out_than_allowed() -> None:
    config = FailureConfig(left_out=10)
    assert decide([at(place())] * 2, config, quarantine=True, num_left_out=8).action is Action.LEAVE_OUT
    assert decide([at(place())] * 2, config, quarantine=True, num_left_out=9).action is Action.GIVE_UP


def test_waits_grow_only_where_nothing_moves() -> None:
    stuck = [judged([failed(KILLED, 10)] * n).delay_s for n in range(1, CONFIG.kills)]
    assert stuck[:4] == [0, 0, 0, 0.2]
    assert stuck == sorted(stuck)
    assert stuck[-1] == 10.0
    assert judged([failed(KILLED, 10)] * 29, max_backoff_s=0.5).delay_s == 0.5
    assert judged([failed(KILLED, step) for step in range(20)]).delay_s == 0


@pytest.mark.parametrize(("key", "value"), [("errors", 0), ("rollbacks", -1), ("max_backoff_s", -0.1)])
def test_impossible_budgets_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value:g} must be at least"):
        FailureConfig(**{key: value})
