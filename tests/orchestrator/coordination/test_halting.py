from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.coordination.halting import Halt, HaltOrder, Purpose
from orchestrator.messages.liveness import AtGate, Gate, StopAt, Told
from trainers.progress import Progress

END, DRAIN, GROW = (HaltOrder(purpose=purpose, reason="why") for purpose in Purpose)


class Trainers:
    """A halt of three ranks, and what it sends."""

    def __init__(self, world_size: int = 3, num_steps: int = 40) -> None:
        self.sent: list[tuple[int, object]] = []
        self.halt = Halt(world_size, 10, num_steps, lambda rank, message: self.sent.append((rank, message)))
        self.halt.begin_attempt(1)

    def take(self) -> list[tuple[int, object]]:
        sent, self.sent = self.sent, []
        return sent

    def at_gate(self, step: int) -> None:
        self.halt.hear(0, AtGate(progress=Progress(step, step * 8)))

    def told(self, rank: int, step: int) -> None:
        self.halt.hear(rank, Told(attempt=1, step=step))


def stop(step: int) -> Callable[[int], tuple[int, StopAt]]:
    return lambda rank: (rank, StopAt(attempt=1, step=step))


def test_rank_0_goes_on_only_when_all_others_have_been_told() -> None:
    trainers, at = Trainers(), stop(8)
    trainers.halt.training()
    assert trainers.take() == []
    assert trainers.halt.request(END)
    assert trainers.take() == [(0, Gate(attempt=1))]
    trainers.at_gate(7)
    assert trainers.take() == [at(1), at(2)]
    trainers.told(2, 8)
    assert trainers.take() == []
    trainers.told(1, 8)
    assert trainers.take() == [at(0)]


def test_an_order_during_the_start_waits_for_the_first_step() -> None:
    trainers = Trainers(world_size=1)
    assert trainers.halt.request(DRAIN) and not trainers.halt.can_save
    assert trainers.take() == []
    trainers.halt.training()
    assert trainers.take() == [(0, Gate(attempt=1))]
    trainers.at_gate(1)
    assert trainers.take() == [stop(2)(0)]


@pytest.mark.parametrize(("at", "expected"), [(7, 10), (10, 20), (19, 20), (33, 40), (39, 40)])
def test_growing_waits_for_the_next_regular_save(at: int, expected: int) -> None:
    trainers = Trainers(world_size=1, num_steps=40)
    trainers.halt.training()
    trainers.halt.request(GROW)
    trainers.at_gate(at)
    assert trainers.halt.step == expected


def test_a_more_urgent_order_replaces_one_and_old_answers_do_not_count() -> None:
    trainers = Trainers(world_size=2)
    trainers.halt.training()
    assert trainers.halt.request(GROW) and not trainers.halt.request(GROW)
    trainers.at_gate(3)
    assert trainers.halt.request(END) and not trainers.halt.request(DRAIN)
    trainers.take()
    trainers.at_gate(4)
    assert trainers.take() == [stop(5)(1)]
    trainers.told(1, 10)
    assert trainers.take() == []
    trainers.told(1, 5)
    assert trainers.take() == [stop(5)(0)]


def test_never_after_the_last_step() -> None:
    trainers = Trainers(world_size=1, num_steps=7)
    trainers.halt.training()
    trainers.halt.request(GROW)
    trainers.at_gate(6)
    assert trainers.halt.step == 7
