"""The coordinator's watch over a running attempt: who hangs, who is slow, and the agreed stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from orchestrator.checkpoint.keys import stack_key
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.blame import stuck_ranks
from orchestrator.coordination.halting import Halt
from orchestrator.coordination.stragglers import Stragglers
from orchestrator.coordination.watchdog import STOPPED_LIMIT_S, TICK_S, Phase, Silence, Watchdog
from orchestrator.errors import UnbrokenError
from orchestrator.messages.attempts import ExitKind, Finished, Reached, Restored, Started, Stepped, TrainerExit
from orchestrator.messages.liveness import AtGate, Beat, Busy, Dump, Entered, Stack, Told
from orchestrator.run_spec import RunSpec

_ANSWER_S = 3.0
"""Seconds that agents have to send stacks."""
_END_LIMIT_S = 120.0
"""Seconds that they have to end their trainers. To give back much memory, or a GPU, takes a while."""


@dataclass
class _Inquiry:
    """Asking every rank where it stands, because nothing moves."""

    until: float
    silent_s: float
    limit_s: float
    stacks: dict[int, Stack] = field(default_factory=dict)


class Guard:
    """One for each coordinator; fed by it."""

    def __init__(
        self, spec: RunSpec, world_size: int, send: Callable[[int, object], None], event: Callable[..., None]
    ) -> None:
        """Args: event: reports; called with the event's kind and its fields."""
        self._spec = spec
        self._world_size = world_size
        self._send = send
        self._event = event
        self._attempt = 0
        self._watchdog = Watchdog(spec.watchdog, world_size)
        self._stragglers = Stragglers(world_size)
        self._stopped: set[int] = set()
        self._started: set[int] = set()
        self._inquiry: _Inquiry | None = None
        self._running = False
        self._ending = Silence(0.0)
        self.halt = Halt(world_size, spec.checkpoint.interval_steps, spec.num_steps, send)

    def begin_attempt(self, attempt: int) -> None:
        self._attempt, self._running, self._inquiry, self._stopped = attempt, True, None, set()
        self._started = set()
        self._watchdog.launched(time.monotonic())
        self._stragglers = Stragglers(self._world_size)
        self.halt.begin_attempt(attempt)

    def end_attempt(self) -> None:
        """The trainers are being ended: nothing more is expected of them."""
        self._running, self._inquiry, self._ending = False, None, Silence(time.monotonic())
        self._watchdog.ended()

    def will_not_end(self, late: AbstractSet[int]) -> bool:
        """Whether the trainers of these ranks, which are not down since `end_attempt`, never will be. Call often.

        An agent may still wait for what its first trainer imports, and hears of nothing else meanwhile.
        """
        started = late <= self._started
        limit_s = _END_LIMIT_S if started else max(_END_LIMIT_S, self._spec.watchdog.start_timeout_s)
        return self._ending.passed(time.monotonic()) >= limit_s

    @property
    def wait_s(self) -> float | None:
        """Seconds until the next `tick` is due."""
        return TICK_S if self._running else None

    def hear(self, rank: int, message: Beat | Busy | Stack | Told) -> None:
        """What an agent says of its trainer."""
        if message.attempt != self._attempt or not self._running:
            return
        match message:
            case Beat(stopped_s=stopped_s, starved_s=starved_s):
                self._watchdog.starved(rank, starved_s)
                (self._stopped.add if stopped_s >= STOPPED_LIMIT_S else self._stopped.discard)(rank)
            case Busy():
                if (slow := self._stragglers.take(rank, message)) is not None:
                    fields = {"rank": slow.rank, "step_s": slow.step_s, "others_s": slow.others_s}
                    self._event("straggler", attempt=self._attempt, **fields)
            case Stack() if self._inquiry is not None:
                self._inquiry.stacks[rank] = message
            case Told():
                self.halt.hear(rank, message)

    def hear_trainer(self, rank: int, message: object) -> None:
        """What a trainer of this attempt says, seen as signs of life."""
        now = time.monotonic()
        match message:
            case Stepped():
                self._watchdog.stepped(now)
            case Reached(stage=stage):
                self._watchdog.moved(now)
                self._event("reached", attempt=self._attempt, rank=rank, stage=stage)
            case Started(attempt=attempt):
                self._watchdog.moved(now)
                if attempt == self._attempt:
                    self._started.add(rank)
            case Restored():
                self._watchdog.moved(now)
            case Entered(phase=phase):
                self._watchdog.entered(rank, phase, now)
            case AtGate():
                self.halt.hear(rank, message)
            case Finished():
                self._watchdog.entered(rank, Phase.DONE, now)

    def tick(self) -> Mapping[int, TrainerExit] | None:
        """Look at the clock. Returns the ranks that are to blame for a hang, if there is one: end the attempt."""
        if not self._running:
            return None
        now = time.monotonic()
        self._watchdog.advance(now)
        if not self._watchdog.expired and not self._stopped:
            self._inquiry = None  # it moves again: slow, not stuck
            return None
        if self._inquiry is None:
            watchdog = self._watchdog
            self._inquiry = _Inquiry(until=now + _ANSWER_S, silent_s=watchdog.silent_s, limit_s=watchdog.limit_s)
            for rank in range(self._world_size):
                self._send(rank, Dump(attempt=self._attempt))
        if len(self._inquiry.stacks) < self._world_size and now < self._inquiry.until:
            return None
        return self._conclude(self._inquiry)

    def _conclude(self, inquiry: _Inquiry) -> Mapping[int, TrainerExit]:
        stacks = {rank: inquiry.stacks.get(rank) for rank in range(self._world_size)}
        threading.Thread(target=self._store, args=(self._attempt, dict(inquiry.stacks)), daemon=True).start()
        stuck = stuck_ranks(stacks)
        if self._stopped:  # nothing to learn from that
            why = f"a trainer has been stopped for {STOPPED_LIMIT_S:g} s"
        else:
            why = f"no step in {inquiry.silent_s:.1f} s (limit {inquiry.limit_s:.1f} s)"
            self._watchdog.alarmed()
        self._event("hang", attempt=self._attempt, ranks=sorted(stuck), why=why, where=list(stuck.values()))
        if not stuck:
            stuck = dict.fromkeys(stacks, "all ranks wait for each other: a lost message, or the network between them")
        return {
            rank: TrainerExit(kind=ExitKind.HANG, message=f"{why}; {text}", details=stack.text if stack else "")
            for rank, text in stuck.items()
            for stack in [stacks[rank]]
        }

    def _store(self, attempt: int, stacks: Mapping[int, Stack]) -> None:
        """In a thread, with a client of its own: storage that does not answer must not hold up the restart."""
        try:
            store = Store.open(self._spec.run_url)
            for rank, stack in stacks.items():
                text = stack.text or "no stack: the process answered no signal\n"
                store.write(stack_key(attempt, rank), [f"state {stack.state}\n{text}".encode()])
        except UnbrokenError as error:
            self._event("stacks_lost", error=str(error))
