"""Rank 0's decisions: when to launch, what to restore, when a checkpoint is complete, what to do after a failure.

A state machine without sockets or threads: messages come in through `handle`, orders go out through `send`. One life of
the trainers, from `Launch` to the last `Down`, is an *attempt*; its number, claimed in storage, is the fencing token.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from orchestrator.checkpoint.attempts import claim_attempt, read_attempts
from orchestrator.checkpoint.catalog import CheckpointInfo, newest_stable
from orchestrator.checkpoint.probe import probe
from orchestrator.checkpoint.retention import claim_fields
from orchestrator.checkpoint.store import Store
from orchestrator.errors import SupersededError, UnbrokenError
from orchestrator.failures import MAX_ATTEMPTS_WITHOUT_PROGRESS, Action, Failure, classify, decide
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
    Reached,
    Receipt,
    Rendezvous,
    Restored,
    SaveEnded,
    SaveFailed,
    Started,
    Stepped,
)
from orchestrator.restore_point import newest_sound, set_aside
from orchestrator.run_spec import RunSpec
from orchestrator.shard_collection import ShardCollection
from trainers.progress import Progress

_MAX_LAUNCH_FAILURES = 10
"""Times in a row that storage may fail an attempt to launch: about a minute in all."""


class Coordinator:
    """One for each group of agents, beside rank 0."""

    def __init__(
        self,
        spec: RunSpec,
        store: Store,
        world_size: int,
        host: str,
        send: Callable[[int, object], None],
        notify: Callable[[Event], None],
        prune: Callable[[int], None],
    ) -> None:
        """Args: prune: called with the attempt after each commit; must not block."""
        self._spec = spec
        self._store = store
        self._world_size = world_size
        self._host = host
        self._send = send
        self._notify = notify
        self._prune = prune
        self._history: list[Failure] = []
        self._attempt = 0
        self._checkpoint: CheckpointInfo | None = None
        self._reached = Progress()
        self._joined: set[int] = set()
        self._ready: set[int] = set()
        self._finished: set[int] = set()
        self._down: dict[int, Down] = {}
        self._stopping = False
        self._shards = ShardCollection(spec, store, world_size)
        self._ended_save: SaveEnded | None = None
        self._launch_at: float | None = None
        self._launch_failures = 0
        self._probed = False
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
            case Receipt() | SaveFailed() if message.attempt != self._attempt:
                pass
            case Receipt() | SaveFailed() if self._ended_save and message.progress == self._ended_save.progress:
                # Another rank's failure has ended this save, maybe before this rank took its snapshot: it has to be
                # told (again), or it waits for ever.
                self._send(rank, self._ended_save)
            case Receipt():
                self._take_receipt(rank, message)
            case SaveFailed(progress=progress, error=error):
                self._save_ended(progress, f"rank {rank}: {error}")
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
        if not self._probed:
            facts, self._probed = probe(self._store), True
            self._event("store", kind=facts.kind, conditional_create=facts.conditional_create, warning=facts.warning)
        seen = _name(newest_stable(self._store))
        if cause == "start" and self._gives_up_at_start(seen):
            return
        info = {"session": self._spec.session, "cause": cause, "from": seen, "world_size": self._world_size}
        self._attempt = claim_attempt(self._store, info | claim_fields(self._spec.keep))
        self._checkpoint = newest_sound(self._store, self._attempt, self._quarantined)
        self._reached = self._restored
        self._ready, self._finished, self._down = set(), set(), {}
        self._shards.clear()
        self._stopping, self._ended_save = False, None
        restore = _name(self._checkpoint)
        self._event("attempt", attempt=self._attempt, restore=restore, cause=cause, world_size=self._world_size)
        self._to_all(Launch(attempt=self._attempt, restore=restore))

    @property
    def _restored(self) -> Progress:
        """Where this attempt began."""
        return self._checkpoint.manifest.progress if self._checkpoint and self._checkpoint.manifest else Progress()

    def _gives_up_at_start(self, newest: str | None) -> bool:
        """Groups of agents that die one after the other leave nothing in memory; count them in storage."""
        stalled = 0
        for record in reversed(read_attempts(self._store)):
            if record.get("session") != self._spec.session or record.get("from") != newest:
                break
            stalled += 1
        if stalled < MAX_ATTEMPTS_WITHOUT_PROGRESS:
            return False
        self._end(Ending.GAVE_UP, f"{stalled} attempts in a row made no newer checkpoint than {newest}")
        return True

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
                self._event("step", attempt=self._attempt, step=progress.step, metrics=dict(metrics))
            case Finished():
                self._finished.add(rank)
                if len(self._finished) == self._world_size:
                    self._end(Ending.FINISHED, f"step {self._spec.num_steps} is done and committed")

    def _take_receipt(self, rank: int, receipt: Receipt) -> None:
        try:
            manifest = self._shards.add(rank, receipt)
        except SupersededError as error:
            self._end(Ending.SUPERSEDED, str(error))
        except UnbrokenError as error:
            self._save_ended(receipt.progress, str(error))
        else:
            if manifest is not None:
                size = sum(file.size_bytes for file in manifest.files)
                self._event("saved", step=receipt.progress.step, attempt=self._attempt, bytes=size)
                self._save_ended(receipt.progress, None)
                self._prune(self._attempt)

    def _save_ended(self, progress: Progress, error: str | None) -> None:
        self._shards.clear()
        self._ended_save = SaveEnded(progress=progress, error=error)
        if error is not None:
            self._event("save_failed", step=progress.step, error=error)
        self._to_all(self._ended_save)
        if self._stopping and len(self._down) == self._world_size and self._launch_at is None:
            self._decide()

    def _take_down(self, rank: int, down: Down) -> None:
        self._down[rank] = down
        if not self._stopping:
            self._stopping = True
            self._event("down", rank=rank, kind=down.exit.kind.value, message=down.exit.message)
            self._to_all(Kill(attempt=self._attempt))
        if len(self._down) < self._world_size:
            return
        pending = {down.pending for down in self._down.values()}
        # An agent may not have read yet that the save it names has ended: that one is nothing to wait for.
        ended = self._ended_save.progress if self._ended_save else None
        if len(pending) == 1 and pending.isdisjoint({None, ended}):
            return  # every rank's snapshot of one step outlived its trainer: it is still committed
        self._decide()

    def _decide(self) -> None:
        rank, cause = classify({rank: down.exit for rank, down in self._down.items()})
        failure = Failure(
            kind=cause.kind,
            rank=rank,
            message=cause.message,
            details=cause.details,
            restored_step=self._restored.step,
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
            self._end(Ending.CONFIG, decision.reason)
        elif decision.action is Action.GIVE_UP:
            self._end(Ending.GAVE_UP, decision.reason)
        else:
            if decision.action is Action.QUARANTINE and self._checkpoint is not None:
                # The file with the damage, where a full check finds it; else what the loading rank saw.
                set_aside(self._store, self._checkpoint, decision.reason, self._attempt, self._quarantined)
            self._launch_at, self._cause = time.monotonic() + decision.delay_s, cause.kind.value

    def _quarantined(self, checkpoint: CheckpointInfo, reason: str) -> None:
        self._event("quarantined", checkpoint=str(checkpoint.ref), reason=reason)

    def broken(self, error: BaseException) -> None:
        """The coordinator itself failed: end the run with the trace, rather than have everything restarted for ever."""
        self._end(Ending.BROKEN, "".join(traceback.format_exception(error)))

    def _end(self, ending: Ending, message: str) -> None:
        self.outcome = Outcome(ending=ending, message=message)
        self._to_all(self.outcome)
        self._event("outcome", ending=ending.value, message=message)

    def _to_all(self, message: object) -> None:
        for rank in range(self._world_size):
            self._send(rank, message)

    def _event(self, kind: str, /, **fields: Any) -> None:
        self._notify(Event(kind=kind, fields=fields, time_s=time.time()))


def _name(checkpoint: CheckpointInfo | None) -> str | None:
    return str(checkpoint.ref) if checkpoint else None
