"""Rank 0's decisions: when to launch, what to restore, when a checkpoint is complete, what to do after a failure.

A state machine without sockets or threads: messages come in through `handle`, orders go out through `send`. One life of
the trainers, from `Launch` to the last `Down`, is an *attempt*; its number, claimed in storage, is the fencing token.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from orchestrator.coordination.casebook import Casebook
from orchestrator.coordination.committing import Chores, CommitEnded
from orchestrator.coordination.evaluation_log import EvaluationLog
from orchestrator.coordination.failures import Action
from orchestrator.coordination.guard import Guard
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.coordination.next_launch import NextLaunch
from orchestrator.coordination.opening import Opener, Opening
from orchestrator.coordination.past import PastReader
from orchestrator.coordination.save_round import SaveRound
from orchestrator.coordination.step_log import StepLog
from orchestrator.errors import GaveUpError, SupersededError, UnbrokenError
from orchestrator.messages.attempts import (
    Down,
    Ending,
    Event,
    Finished,
    FromTrainer,
    Joined,
    Kill,
    Listening,
    Outcome,
    Rendezvous,
    Restored,
    Started,
    Stepped,
    TrainerExit,
)
from orchestrator.messages.evaluations import Drew, Evaluated, Validated
from orchestrator.messages.liveness import Beat, Busy, Stack, Told
from orchestrator.messages.saves import Paused, Receipt, SaveDelayed, SaveFailed, Skipped
from orchestrator.run_spec import RunSpec
from orchestrator.stores import Stores
from trainers.progress import Progress


class Coordinator:
    """One for each group of agents, beside rank 0."""

    def __init__(
        self,
        spec: RunSpec,
        stores: Stores,
        world_size: int,
        host: str,
        send: Callable[[int, object], None],
        notify: Callable[[Event], None],
        chores: Chores,
    ) -> None:
        """Args: chores: must not block; a commit is answered through `handle`."""
        self._spec = spec
        self._world_size = world_size
        self._host = host
        self._send = send
        self._notify = notify
        self._opener = Opener(spec, stores, world_size, self._event)
        self._casebook = Casebook(spec, self._event, self._opener.distrust)
        self._past = PastReader(spec, self._event)
        self._steps = StepLog(self._past, self._event)
        self._opening = Opening(attempt=0)
        self._joined, self._ready, self._finished = set[int](), set[int](), set[int]()
        self._down: dict[int, Down] = {}
        self._stopping = False
        self._save = SaveRound(spec, stores, world_size, chores, send, self._event, lambda: self._past.past)
        self._evaluations = EvaluationLog(self._save, chores, self._event)
        self._memory: Progress | None = None
        self._guard = Guard(spec, world_size, send, self._event)
        self._next = NextLaunch(spec.checkpoint.deadline_s)
        self.outcome: Outcome | None = None
        """Set when there is nothing left to do; every agent has been told."""

    def handle(self, rank: int, message: object) -> None:
        """Take one message of an agent."""
        if self.outcome is not None:
            return
        match message:
            case Joined():
                self._joined.add(rank)
                if len(self._joined) == self._world_size:
                    self._try_launch()
            case Started():
                self._event("trainer", rank=rank, **vars(message))
                self._guard.hear_trainer(rank, message)
            case Beat() | Busy() | Stack() | Told():
                self._guard.hear(rank, message)
            case FromTrainer(attempt=attempt, message=inner) if attempt == self._attempt and not self._stopping:
                self._from_trainer(rank, inner)
            case Receipt() | SaveFailed() | CommitEnded() if message.attempt == self._attempt:
                self._hear_of_save(rank, message)
            case SaveDelayed() if message.attempt == self._attempt:
                self._event("save_delayed", rank=rank, step=message.progress.step, error=message.error)
            case Down(attempt=attempt) if attempt == self._attempt:
                self._take_down(rank, message)

    def agent_lost(self, rank: int, why: str) -> None:
        """An agent is gone: end the trainers; whoever placed the agents replaces the group."""
        self._event("agent_lost", rank=rank, why=why)
        self._stop({})

    def take_order(self, order: HaltOrder) -> None:
        """Bring all ranks to a stop, saved; at once, if there is nothing to save."""
        if self.outcome is not None or not self._guard.halt.request(order):
            return
        self._event("halting", purpose=order.purpose.value, reason=order.reason)
        if order.purpose is not Purpose.GROW and (self._next.planned or not self._guard.halt.can_save):
            self._next.cancel()
            self._after_save(self._end_halted)

    @property
    def wait_s(self) -> float | None:
        """Seconds until `tick` has something to do; None: nothing is due."""
        return self._next.wait_s if self._next.planned else self._guard.wait_s

    def tick(self) -> None:
        """Do what is due."""
        if self._next.take():
            self._try_launch()
        if (causes := self._guard.tick()) is not None:
            self._stop(causes)
        if self._stopping and (late := set(range(self._world_size)) - self._down.keys()):
            if self._guard.will_not_end(late):
                self._replace_agents(late)

    def _try_launch(self) -> None:
        """Launch, or try again in a while if storage does not answer; the trainers are down and lose nothing."""
        try:
            self._launch(self._next.cause)
        except (GaveUpError, SupersededError) as error:
            self._end(Ending.GAVE_UP if isinstance(error, GaveUpError) else Ending.SUPERSEDED, str(error))
        except UnbrokenError as error:
            if (delay_s := self._next.failed()) is None:
                self._end(Ending.STORAGE, str(error))
            else:
                self._event("storage_trouble", message=str(error), retry_s=delay_s)
        else:
            self._next.succeeded()

    def _launch(self, cause: str) -> None:
        remembered = self._save.remembered(self._memory)
        self._opening = opening = self._opener.open(cause, self._casebook.exclusions, remembered)
        exclusions = self._casebook.learn(opening.checkpoint)
        self._past.begin(opening.attempt, opening.progress.step, exclusions)
        self._steps.begin_attempt(opening.attempt, opening.progress, self._casebook.changed_from)
        self._ready, self._finished, self._down = set(), set(), {}
        self._save.begin_attempt(opening)
        self._stopping = False
        self._guard.begin_attempt(self._attempt)
        self._event("attempt", **opening.facts, cause=cause, world_size=self._world_size)
        self._to_all(opening.launch(exclusions, self._save.every_steps))

    @property
    def _attempt(self) -> int:
        return self._opening.attempt

    def _from_trainer(self, rank: int, inner: object) -> None:
        self._guard.hear_trainer(rank, inner)
        match inner:
            case Listening(port=port):
                self._to_all(Rendezvous(host=self._host, port=port))
            case Restored(progress=progress):
                self._ready.add(rank)
                if len(self._ready) == self._world_size:
                    self._event("training", attempt=self._attempt, step=progress.step)
                    self._guard.halt.training()
                    self._save.then = None  # if there is an order to stop: now there is more to save
            case Stepped():
                self._save.note(inner.progress, inner.metrics, self._guard.halt.reason(inner.progress.step))
                difference = self._steps.take(inner)
                if difference is not None and self._spec.failures.on_replay_difference == "stop":
                    self._end(Ending.GAVE_UP, f"{difference} (failures.on_replay_difference=stop)")
            case Skipped() | Paused():
                self._save.report(inner)
            case Validated() | Drew() | Evaluated():
                self._evaluations.take(self._attempt, inner)
            case Finished(progress=progress, stopped=stopped):
                self._finished.add(rank)
                if len(self._finished) < self._world_size:
                    return
                if stopped is not None:
                    self._end(Ending.STORAGE, stopped)
                elif progress.step < self._spec.num_steps:
                    self._end_halted()
                else:
                    self._end(Ending.FINISHED, f"step {self._spec.num_steps} is done and committed")

    def _hear_of_save(self, rank: int, message: Receipt | SaveFailed | CommitEnded) -> None:
        if not isinstance(message, CommitEnded):
            self._save.take(rank, message)
        elif message.superseded and self._opener.claimed == message.attempt:
            self._end(Ending.SUPERSEDED, message.error or "")
        else:  # superseded by this very group, which is about to launch the next attempt: a failed save like others
            self._save.take_commit(message)

    def _take_down(self, rank: int, down: Down) -> None:
        self._down[rank] = down
        if not self._stopping:
            self._event("down", rank=rank, kind=down.exit.kind.value, message=down.exit.message)
            self._stop({})
        self._casebook.hear(down, self._steps.reached.step)
        if len(self._down) == self._world_size:
            self._decide()

    def _stop(self, causes: Mapping[int, TrainerExit]) -> None:
        """End the trainers; `causes` says why, for those whose fault it is."""
        self._stopping = True
        self._guard.end_attempt()
        for rank in range(self._world_size):
            self._send(rank, Kill(attempt=self._attempt, cause=causes.get(rank)))

    def _replace_agents(self, late: set[int]) -> None:
        """Some have not ended their trainers: SIGKILL does not end what waits for a device, nor what is not sent it."""
        for rank in sorted(late):
            self._event("agent_lost", rank=rank, why="its trainer does not end")
        self.outcome = Outcome(ending=Ending.REGROUP, message="a trainer can not be ended")
        self._to_all(self.outcome)

    def _decide(self) -> None:
        exits = {rank: down.exit for rank, down in self._down.items()}
        decision = self._casebook.judge(self._attempt, exits, self._opening.progress.step, self._steps.reached.step)
        self._memory = None
        if decision.action is Action.REFUSE:
            self._after_save(partial(self._end, Ending.CONFIG, decision.reason))
        elif decision.action is Action.GIVE_UP:
            self._after_save(partial(self._end, Ending.GAVE_UP, decision.reason))
        elif self._guard.halt.order is not None:
            self._after_save(self._end_halted)
        elif decision.action in (Action.ROLL_BACK, Action.LEAVE_OUT):
            self._after_save(partial(self._relaunch, decision.delay_s))
        else:
            held = {down.held for down in self._down.values()}
            # Only a plain restart may go on from memory: anything else distrusts what the trainers were doing, or
            # changes what they are to do.
            self._memory = held.pop() if decision.action is Action.RESTART and len(held) == 1 else None
            if decision.action is Action.QUARANTINE:
                self._opener.set_aside(self._opening, decision.reason)
            self._relaunch(decision.delay_s)

    def _relaunch(self, delay_s: float) -> None:
        """Start the trainers again in a while, unless they are to stop anyway."""
        if self._guard.halt.order is not None:
            self._end_halted()
        else:
            self._next.plan(delay_s, self._casebook.last_kind.value)

    def broken(self, error: BaseException) -> None:
        """The coordinator itself failed: end the run with the trace, rather than have everything restarted for ever."""
        self._end(Ending.BROKEN, "".join(traceback.format_exception(error)))

    def _after_save(self, then: Callable[[], None]) -> None:
        """Do `then` when a snapshot that no trainer needs any more, but that all agents hold, is committed or lost."""
        if len(self._down) == self._world_size:
            pending = {down.pending for down in self._down.values()}
        else:  # the trainers are about to begin from it
            pending = {None if self._opening.memory == self._opening.committed else self._opening.memory}
        # An agent may not have read yet that the save it names has ended: that one is nothing to wait for.
        progress = pending.pop() if len(pending) == 1 else None
        if progress is None or self._save.has_ended(progress) or self._opener.distrusts(progress):
            then()
        else:
            self._save.then = then

    def _end_halted(self) -> None:
        """All ranks have stopped as ordered, or failed on the way."""
        order, saved = self._guard.halt.order, self._save.ended
        assert order is not None
        self._guard.end_attempt()
        kept = saved.summary if saved else "nothing new to save"
        if order.purpose is Purpose.END:
            self._end(Ending.STOPPED, f"{order.reason}: {kept}")
            return
        self._event("regroup", reason=order.reason, kept=kept)
        self.outcome = Outcome(ending=Ending.REGROUP, message=order.reason)
        self._to_all(self.outcome)

    def _end(self, ending: Ending, message: str) -> None:
        self.outcome = Outcome(ending=ending, message=message)
        claimed = {"attempt": self._opener.claimed} if self._opener.claimed else {}
        self._event("outcome", ending=ending.value, message=message, **claimed)  # first: those who are told end
        self._to_all(self.outcome)

    def _to_all(self, message: object) -> None:
        for rank in range(self._world_size):
            self._send(rank, message)

    def _event(self, kind: str, /, **fields: Any) -> None:
        self._notify(Event(kind=kind, fields=fields, time_s=time.time()))
