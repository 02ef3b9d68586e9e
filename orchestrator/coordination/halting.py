"""How all ranks come to stop after one and the same step, without a collective in every step.

Rank 0 is asked to stand still after the step that it is in, X. As a step is complete only when rank 0 has taken part in
it, nobody can complete X + 1 meanwhile. The other ranks are then told where to stop; when that message lies in front of
each of them, to be read after their next step, rank 0 goes on. So X + 1 is the earliest step that all can agree on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from orchestrator.messages.liveness import AtGate, Gate, StopAt, Told


class Purpose(Enum):
    """What the stop is for."""

    END = "end"  # the driver was asked to end: the run is resumed another time
    DRAIN = "drain"  # a node is about to be taken away: go on without it
    GROW = "grow"  # there is room for more workers: not urgent, the next regular save will do


@dataclass(frozen=True, kw_only=True)
class HaltOrder:
    """Stop all ranks, saved. From the driver to the coordinator."""

    purpose: Purpose
    reason: str


class Halt:
    """One agreed stop. Pure, but for what it sends."""

    def __init__(self, world_size: int, every_steps: int, num_steps: int, send: Callable[[int, object], None]) -> None:
        self._world_size = world_size
        self._every_steps = every_steps
        self._num_steps = num_steps
        self._send = send
        self._attempt = 0
        self._training = False
        self._told: set[int] = set()
        self.order: HaltOrder | None = None
        """What all ranks are being stopped for."""
        self.step: int | None = None
        """After which step, once that is agreed."""

    def begin_attempt(self, attempt: int) -> None:
        self._attempt, self._training, self.step = attempt, False, None

    def request(self, order: HaltOrder) -> bool:
        """Take an order; whether it counts: the more urgent one does (END, then DRAIN, then GROW)."""
        rank = list(Purpose).index
        if self.order is not None and rank(self.order.purpose) <= rank(order.purpose):
            return False
        self.order, self.step = order, None
        if self._training:
            self._send(0, Gate(attempt=self._attempt))
        return True

    @property
    def can_save(self) -> bool:
        """Whether the trainers have something to save; while they start they have not."""
        return self._training

    def training(self) -> None:
        """Every rank trains now."""
        self._training = True
        if self.order is not None:
            self._send(0, Gate(attempt=self._attempt))

    def reason(self, step: int) -> str | None:
        """In one word, why the state after `step` is saved, if it is this stop that saves it."""
        if self.order is None or step != self.step:
            return None
        return self.order.reason.lower() if self.order.purpose is Purpose.END else self.order.purpose.value

    def hear(self, rank: int, message: AtGate | Told) -> None:
        """A rank's part of the agreement."""
        if self.order is None:
            return
        if isinstance(message, AtGate):
            step = message.progress.step
            if self.order.purpose is Purpose.GROW:
                step = step - step % self._every_steps + self._every_steps
            else:
                step += 1
            self.step, self._told = min(step, self._num_steps), set()
            for other in range(1, self._world_size):
                self._send(other, self._stop_at)
        elif message.step == self.step:
            self._told.add(rank)
        else:
            return  # of an order that a more urgent one has replaced
        if len(self._told) == self._world_size - 1:
            self._send(0, self._stop_at)

    @property
    def _stop_at(self) -> StopAt:
        assert self.step is not None
        return StopAt(attempt=self._attempt, step=self.step)
