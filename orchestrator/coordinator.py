"""Rank 0's decisions: when to launch, what to restore, when a checkpoint is complete, what to do after a failure.

A state machine without sockets or threads: messages come in through `handle`, orders go out through `send`. One life of
the trainers, from `Launch` to the last `Down`, is an *attempt*; its number, claimed in storage, is the fencing token.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from orchestrator.committing import Chores, CommitEnded
from orchestrator.errors import GaveUpError, UnbrokenError
from orchestrator.failures import Action, Failure, classify, decide
from orchestrator.messages import (
    Down,
    Ending,
    Event,
    Finished,
    FromTrainer,
    Joined,
    Kill,
    Launch,
    Listening,
    Outcome,
    Paused,
    Reached,
    Receipt,
    Rendezvous,
    Restored,
    SaveDelayed,
    SaveFailed,
    Skipped,
    Started,
    Stepped,
)
from orchestrator.opening import Opener, Opening
from orchestrator.restore_point import set_aside
from orchestrator.run_spec import RunSpec
from orchestrator.save_round import SaveRound
from orchestrator.sections import TierName
from orchestrator.stores import Stores
from trainers.progress import Progress

_MAX_LAUNCH_FAILURES = 10
"""Times in a row that storage may fail an attempt to launch: about a minute in all."""


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
        self._stores = stores
        self._world_size = world_size
        self._host = host
        self._send = send
        self._notify = notify
        self._chores = chores
        self._history: list[Failure] = []
        self._opener = Opener(spec, stores, world_size, self._event)
        self._opening = Opening(attempt=0)
        self._reached = Progress()
        self._joined: set[int] = set()
        self._ready: set[int] = set()
        self._finished: set[int] = set()
        self._down: dict[int, Down] = {}
        self._stopping = False
        self._save = SaveRound(spec, stores, world_size)
        self._memory: Progress | None = None
        self._last_words: tuple[Ending, str] | None = None
        self._launch_at: float | None = None
        self._launch_failures = 0
        self._cause = "start"
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
                    self._try_launch(cause="start")
            case Started():
                self._event("trainer", rank=rank, pid=message.pid, agent_pid=message.agent_pid, attempt=message.attempt)
            case FromTrainer(attempt=attempt, message=inner) if attempt == self._attempt and not self._stopping:
                self._from_trainer(rank, inner)
            case Receipt() | SaveFailed() if message.attempt == self._attempt:
                self._hear_of_save(rank, message)
            case SaveDelayed() if message.attempt == self._attempt:
                self._event("save_delayed", rank=rank, step=message.progress.step, error=message.error)
            case CommitEnded() if (
                message.attempt == self._attempt
            ):  # of an older one, this very group has superseded it
                self._hear_of_commit(message)
            case Down(attempt=attempt) if attempt == self._attempt:
                self._take_down(rank, message)

    def agent_lost(self, rank: int) -> None:
        """An agent is gone: end the trainers; whoever placed the agents replaces the group."""
        self._event("agent_lost", rank=rank)
        self._stopping = True
        self._to_all(Kill(attempt=self._attempt))

    @property
    def wait_s(self) -> float | None:
        """Seconds until `tick` has something to do; None: nothing is due."""
        return None if self._launch_at is None else max(0.0, self._launch_at - time.monotonic())

    def tick(self) -> None:
        """Do what is due."""
        if self._launch_at is not None and time.monotonic() >= self._launch_at:
            self._launch_at = None
            self._try_launch(self._cause)

    def _try_launch(self, cause: str) -> None:
        """Launch, or try again in a while if storage does not answer; the trainers are down and lose nothing."""
        try:
            self._launch(cause)
        except GaveUpError as error:
            self._end(Ending.GAVE_UP, str(error))
        except UnbrokenError as error:
            self._launch_failures += 1
            if self._launch_failures >= _MAX_LAUNCH_FAILURES:
                self._end(Ending.STORAGE, str(error))
                return
            delay_s = min(10.0, 0.2 * 2**self._launch_failures)
            self._event("storage_trouble", message=str(error), retry_s=delay_s)
            self._launch_at, self._cause = time.monotonic() + delay_s, cause
        else:
            self._launch_failures = 0

    def _launch(self, cause: str) -> None:
        self._opening = opening = self._opener.open(cause, self._save.remembered(self._memory))
        self._reached = opening.progress
        self._ready, self._finished, self._down = set(), set(), {}
        self._save.begin_attempt(opening)
        self._stopping = False
        attempt, restore, memory = opening.attempt, opening.restore, opening.memory
        in_memory = memory and memory.step
        where = {"restore": restore, "tier": opening.tier, "memory": in_memory}
        self._event("attempt", attempt=attempt, **where, cause=cause, world_size=self._world_size)
        launch = Launch(attempt=attempt, restore=restore, tier=opening.tier, memory=memory, committed=opening.committed)
        self._to_all(launch)

    @property
    def _attempt(self) -> int:
        return self._opening.attempt

    def _from_trainer(self, rank: int, message: object) -> None:
        match message:
            case Listening(port=port):
                self._to_all(Rendezvous(host=self._host, port=port))
            case Reached(stage=stage):
                self._event("reached", attempt=self._attempt, rank=rank, stage=stage)
            case Restored(progress=progress):
                self._ready.add(rank)
                if len(self._ready) == self._world_size:
                    self._event("training", attempt=self._attempt, step=progress.step)
            case Stepped(progress=progress, metrics=metrics):
                self._reached = progress
                self._save.note(progress, metrics)
                self._event("step", attempt=self._attempt, step=progress.step, metrics=dict(metrics))
            case Skipped(progress=progress):
                self._event("save_skipped", step=progress.step)
            case Paused(progress=progress, stall_s=stall_s):
                self._event("snapshot", attempt=self._attempt, step=progress.step, stall_s=stall_s)
            case Finished(stopped=stopped):
                self._finished.add(rank)
                if len(self._finished) == self._world_size:
                    finished = f"step {self._spec.num_steps} is done and committed"
                    self._end(Ending.STORAGE if stopped else Ending.FINISHED, stopped or finished)

    def _hear_of_save(self, rank: int, message: Receipt | SaveFailed) -> None:
        if self._save.has_ended(message.progress, message.tier):
            # Another rank's failure has ended this save, maybe before this rank took its snapshot: it has to be told
            # (again), or it waits for ever.
            if self._save.ended is not None:
                self._send(rank, self._save.ended)
            return
        job = self._save.take(rank, message)
        if job is not None:
            self._chores.commit(job)
        elif isinstance(message, SaveFailed):
            self._announce_save(message.progress, message.tier, f"rank {rank}: {message.error}")

    def _hear_of_commit(self, commit: CommitEnded) -> None:
        if commit.superseded:
            self._end(Ending.SUPERSEDED, commit.error or "")
            return
        self._save.end(commit.progress, commit.tier, commit.error, commit.attempt)
        if commit.error is None:
            size, step = commit.size_bytes, commit.progress.step
            self._event("saved", step=step, attempt=commit.attempt, bytes=size, tier=commit.tier)
            self._chores.prune(commit.attempt, commit.tier)
        self._announce_save(commit.progress, commit.tier, commit.error)

    def _announce_save(self, progress: Progress, tier: TierName, error: str | None) -> None:
        """Report a failure, and tell everybody if the save is over in all tiers."""
        if error is not None:
            self._event("save_failed", step=progress.step, tier=tier, error=error)
        if not self._save.has_ended(progress):
            return
        self._to_all(self._save.ended)
        if self._last_words is not None:
            self._end(*self._last_words)

    def _take_down(self, rank: int, down: Down) -> None:
        self._down[rank] = down
        if not self._stopping:
            self._stopping = True
            self._event("down", rank=rank, kind=down.exit.kind.value, message=down.exit.message)
            self._to_all(Kill(attempt=self._attempt))
        if len(self._down) == self._world_size:
            self._decide()

    def _decide(self) -> None:
        rank, cause = classify({rank: down.exit for rank, down in self._down.items()})
        failure = Failure(
            kind=cause.kind,
            rank=rank,
            message=cause.message,
            details=cause.details,
            restored_step=self._opening.progress.step,
            reached_step=self._reached.step,
        )
        self._history.append(failure)
        decision = decide(self._history)
        self._event(
            "failure",
            attempt=self._attempt,
            rank=rank,
            kind=cause.kind.value,
            action=decision.action.value,
            reason=decision.reason,
            details=cause.details,
            step=self._reached.step,
        )
        if decision.action is Action.REFUSE:
            self._end_after_save(Ending.CONFIG, decision.reason)
        elif decision.action is Action.GIVE_UP:
            self._end_after_save(Ending.GAVE_UP, decision.reason)
        else:
            held = {down.held for down in self._down.values()}
            # Only a plain restart may go on from memory: anything else distrusts what the trainers were doing.
            self._memory = held.pop() if decision.action is Action.RESTART and len(held) == 1 else None
            if decision.action is Action.QUARANTINE and self._opening.checkpoint is not None:
                # The file with the damage, where a full check finds it; else what the loading rank saw.
                report = self._opener.report_quarantine
                set_aside(
                    self._stores.of(self._opening.tier),
                    self._opening.checkpoint,
                    decision.reason,
                    self._attempt,
                    report,
                )
            self._launch_at, self._cause = time.monotonic() + decision.delay_s, cause.kind.value

    def broken(self, error: BaseException) -> None:
        """The coordinator itself failed: end the run with the trace, rather than have everything restarted for ever."""
        self._end(Ending.BROKEN, "".join(traceback.format_exception(error)))

    def _end_after_save(self, ending: Ending, message: str) -> None:
        """A snapshot that outlived the trainers on all ranks is still committed before the run ends."""
        pending = {down.pending for down in self._down.values()}
        # An agent may not have read yet that the save it names has ended: that one is nothing to wait for.
        if len(pending) == 1 and (progress := pending.pop()) and not self._save.has_ended(progress):
            self._last_words = ending, message
        else:
            self._end(ending, message)

    def _end(self, ending: Ending, message: str) -> None:
        self.outcome = Outcome(ending=ending, message=message)
        self._event("outcome", ending=ending.value, message=message)  # first: those who are told end
        self._to_all(self.outcome)

    def _to_all(self, message: object) -> None:
        for rank in range(self._world_size):
            self._send(rank, message)

    def _event(self, kind: str, /, **fields: Any) -> None:
        self._notify(Event(kind=kind, fields=fields, time_s=time.time()))
