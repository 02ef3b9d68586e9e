"""Commits beside everything else that rank 0 does: in a thread, repeated until a deadline, never waited for.

A store that takes a minute to say no must not keep the coordinator from hearing that a trainer has died.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol, cast

from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, ShardReceipt, commit
from orchestrator.coordination.pruning import BackgroundPruner
from orchestrator.errors import StorageError, SupersededError, UnbrokenError, UnknownOutcomeError
from orchestrator.messages.attempts import Event
from orchestrator.retries import Retries, patiently
from orchestrator.run_spec import RunSpec
from orchestrator.sections import TierName
from orchestrator.stores import Stores
from trainers.progress import Progress


@dataclass(frozen=True, kw_only=True)
class CommitJob:
    """A checkpoint of which every shard is stored and verified."""

    shards: Sequence[ShardReceipt]
    info: CommitInfo
    tier: TierName
    last: bool = True
    """No other tier follows."""


@dataclass(frozen=True, kw_only=True)
class CommitEnded:
    """What became of a `CommitJob`."""

    attempt: int
    progress: Progress
    tier: TierName
    last: bool = True
    size_bytes: int = 0
    error: str | None = None
    """None: it is committed."""
    superseded: bool = False
    """A newer attempt owns the run."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Images that were drawn, to be shown."""

    key: str
    png: bytes
    fields: Mapping[str, Any]
    """Of the event that says so; `path` is added."""


class Chores(Protocol):
    """What the coordinator has done in the background."""

    def commit(self, job: CommitJob) -> None:
        """Answered by a `CommitEnded`, which the coordinator is to be handed."""
        ...

    def keep(self, picture: Picture) -> None:
        """Store it and report it, before any later commit."""
        ...

    def prune(self, attempt: int, tier: TierName) -> None: ...


class BackgroundChores:
    """Commits and prunes in threads with clients of their own."""

    def __init__(self, spec: RunSpec, stores: Stores, notify: Callable[[Event], None]) -> None:
        """Args: notify: told, from the threads, what is removed, and which pictures are stored."""
        self._stores = stores
        self._notify = notify
        self._deadline_s = spec.checkpoint.deadline_s
        self._retries = Retries(0.0)
        self._jobs: queue.SimpleQueue[tuple[CommitJob, Retries] | Picture | None] = queue.SimpleQueue()
        self.results, self._send = cast(tuple[Connection, Connection], Pipe(duplex=False))
        """Delivers a `CommitEnded` for each job."""
        config = spec.checkpoint
        keep, undo_steps = config.retention, spec.rollback_steps
        self._pruners = {"storage": BackgroundPruner(lambda: Store.open(spec.run_url), keep, notify, undo_steps)}
        if (peer := stores.peer) is not None and config.peer is not None:
            # Memory is dear, and nobody but trainers that start reads it: what is superfluous goes at once, unreported.
            keep = RetentionConfig(last=config.peer.keep, grace_s=0.0)
            self._pruners["peer"] = BackgroundPruner(lambda: peer, keep, lambda _: None)
        threading.Thread(target=self._work, name="committer", daemon=True).start()

    def commit(self, job: CommitJob) -> None:
        """One is in flight at a time; another one means that the one before is not to be tried again."""
        self._retries.end()
        self._retries = Retries(self._deadline_s)
        self._jobs.put((job, self._retries))

    def keep(self, picture: Picture) -> None:
        # In the queue of the commits: so that the last one is known of before the run ends with its last commit.
        self._jobs.put(picture)

    def prune(self, attempt: int, tier: TierName) -> None:
        self._pruners[tier].request(attempt)

    def close(self) -> None:
        """End the threads when they are done with what is under way; nobody waits for that."""
        self._retries.end()
        self._jobs.put(None)
        for pruner in self._pruners.values():
            pruner.close()

    def _work(self) -> None:
        while (work := self._jobs.get()) is not None:
            if isinstance(work, Picture):
                self._store(work)
                continue
            job, retries = work
            store = self._stores.of(job.tier)
            if job.tier == "storage":
                self._send.send(carry_out(store, job, retries.pause, self._delayed))
            else:  # there is a next time soon, and storage must not wait
                self._send.send(carry_out(store, job, lambda: False))

    def _delayed(self, job: CommitJob, error: Exception) -> None:
        fields = {"rank": 0, "step": job.info.progress.step, "error": str(error)}  # rank 0's agent commits for all
        self._notify(Event(kind="save_delayed", fields=fields, time_s=time.time()))

    def _store(self, picture: Picture) -> None:
        """Once: a picture is not worth holding up a checkpoint."""
        store, fields = self._stores.storage, dict(picture.fields)
        try:
            store.write(picture.key, [picture.png])
        except Exception as error:  # whatever it is: the checkpoints behind it in the queue must not wait for ever
            why = str(error) if isinstance(error, UnbrokenError) else f"{type(error).__name__}: {error}"
            self._notify(Event(kind="samples_lost", fields={**fields, "error": why}, time_s=time.time()))
        else:
            fields["path"] = f"{store.url}/{picture.key}"
            self._notify(Event(kind="samples", fields=fields, time_s=time.time()))


def carry_out(
    store: Store,
    job: CommitJob,
    pause: Callable[[], bool],
    delayed: Callable[[CommitJob, Exception], None] = lambda job, error: None,
) -> CommitEnded:
    """Commit, again and again as long as `pause` says so.

    A commit whose outcome is unknown is repeated like one that failed: creating the same manifest a second time looks
    first. If nobody knows to the end, the error says so; the files stay, and whatever took effect is found by listing.

    Args:
        delayed: told why the first try failed.
    """
    ended = CommitEnded(attempt=job.info.attempt, progress=job.info.progress, tier=job.tier, last=job.last)
    again = (StorageError, UnknownOutcomeError)
    try:
        manifest = patiently(partial(commit, store, job.shards, job.info), pause, partial(delayed, job), again)
    except SupersededError as error:
        return replace(ended, error=str(error), superseded=True)
    except Exception as error:  # a bug here fails the save, and must not go unnoticed
        return replace(ended, error=str(error) if isinstance(error, UnbrokenError) else repr(error))
    return replace(ended, size_bytes=sum(file.size_bytes for file in manifest.files))
