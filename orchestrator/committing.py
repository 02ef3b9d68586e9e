"""Commits beside everything else that rank 0 does: in a thread, repeated until a deadline, never waited for.

A store that takes a minute to say no must not keep the coordinator from hearing that a trainer has died.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Protocol, cast

from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, ShardReceipt, commit
from orchestrator.errors import StorageError, SupersededError, UnbrokenError, UnknownOutcomeError
from orchestrator.messages import Event
from orchestrator.pruning import BackgroundPruner
from orchestrator.retries import Retries
from orchestrator.run_spec import RunSpec
from trainers.progress import Progress


@dataclass(frozen=True, kw_only=True)
class CommitJob:
    """A checkpoint of which every shard is stored and verified."""

    shards: Sequence[ShardReceipt]
    info: CommitInfo


@dataclass(frozen=True, kw_only=True)
class CommitEnded:
    """What became of a `CommitJob`."""

    attempt: int
    progress: Progress
    size_bytes: int = 0
    error: str | None = None
    """None: it is committed."""
    superseded: bool = False
    """A newer attempt owns the run."""


class Chores(Protocol):
    """What the coordinator has done in the background."""

    def commit(self, job: CommitJob) -> None:
        """Answered by a `CommitEnded`, which the coordinator is to be handed."""
        ...

    def prune(self, attempt: int) -> None: ...


class BackgroundChores:
    """Commits and prunes in threads with clients of their own."""

    def __init__(self, spec: RunSpec, store: Store, notify: Callable[[Event], None]) -> None:
        """Args: notify: told, from the pruning thread, what it removes."""
        self._store = store
        self._deadline_s = spec.checkpoint.deadline_s
        self._retries = Retries(0.0)
        self._jobs: queue.SimpleQueue[tuple[CommitJob, Retries]] = queue.SimpleQueue()
        self.results, self._send = cast(tuple[Connection, Connection], Pipe(duplex=False))
        """Delivers a `CommitEnded` for each job."""
        self._pruner = BackgroundPruner(spec, notify)
        threading.Thread(target=self._work, name="committer", daemon=True).start()

    def commit(self, job: CommitJob) -> None:
        """One is in flight at a time; another one means that the one before is not to be tried again."""
        self._retries.end()
        self._retries = Retries(self._deadline_s)
        self._jobs.put((job, self._retries))

    def prune(self, attempt: int) -> None:
        self._pruner.request(attempt)

    def _work(self) -> None:
        while True:
            job, retries = self._jobs.get()
            self._send.send(carry_out(self._store, job, retries.pause))


def carry_out(store: Store, job: CommitJob, pause: Callable[[], bool]) -> CommitEnded:
    """Commit, again and again as long as `pause` says so.

    A commit whose outcome is unknown is repeated like one that failed: creating the same manifest a second time looks
    first. If nobody knows to the end, the error says so; the files stay, and whatever took effect is found by listing.
    """
    attempt, progress = job.info.attempt, job.info.progress
    while True:
        try:
            manifest = commit(store, job.shards, job.info)
        except SupersededError as error:
            return CommitEnded(attempt=attempt, progress=progress, error=str(error), superseded=True)
        except (StorageError, UnknownOutcomeError) as error:
            if not pause():
                return CommitEnded(attempt=attempt, progress=progress, error=str(error))
        except Exception as error:  # not to be repeated; a bug here fails the save, and must not go unnoticed
            why = str(error) if isinstance(error, UnbrokenError) else repr(error)
            return CommitEnded(attempt=attempt, progress=progress, error=why)
        else:
            size = sum(file.size_bytes for file in manifest.files)
            return CommitEnded(attempt=attempt, progress=progress, size_bytes=size)
