"""Removing what the policy does not keep. May be interrupted anywhere and repeated by anybody.

A checkpoint is removed in two strokes, so that nobody who reads it loses it:
1. It is marked as expired. From here on nobody begins to read it, except a run that has nothing newer left.
2. `grace_s` after the mark was set, if the policy still does not keep it: the manifest goes first, so that there is no
   moment at which a checkpoint counts and lacks a file; then the files; the mark last, so that a removal that was
   interrupted is recognised and completed.

The age of a mark that an earlier process has set is asked of the store, by its one clock, so that no two have to agree;
where a store has none, it counts from when this process saw it.

Most of what a long run keeps, it keeps for good, and looks at seldom: see `Pruner`.

What an older attempt never committed was never readable and goes at once; but the mark that it was abandoned stays in
the place of its manifest for a day, or that attempt could wake up and commit what has lost its files. Should it wake up
later, or in the middle of repeating the creation of a manifest that had succeeded, and was removed since, then its
checkpoint is damaged, as files are missing, and the next pass removes it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.attempts import check_not_superseded, newest_attempt
from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState, abandon, look, scan_checkpoints
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.policy import RetentionConfig, Verdict, decisive, judge
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError
from trainers.decode import decode

_LOOKS = 16
"""Of what stays for good so many are looked at in a pass."""
_SWEEP_EVERY_S = 600.0
"""So often unfinished uploads are looked for, and by each attempt, unless it is known when the next one may go."""
_COMMITTED = (
    CheckpointState.STABLE,
    CheckpointState.UNHEALTHY,
    CheckpointState.DAMAGED,
    CheckpointState.QUARANTINED,
)
_UNREADABLE = (CheckpointState.WRITING, CheckpointState.ABANDONED, CheckpointState.EXPIRED)
_CLAIM_FIELD, _UNDO_FIELD = "keep", "undo_steps"
_UPLOAD_S = 86400.0  # no upload takes a day, whoever's it is, and nobody commits what was shut to him a day ago


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A checkpoint that is gone."""

    ref: CheckpointRef
    reason: str


class Pruner:
    """Removes checkpoints, pass after pass. Only the newest attempt prunes, and no two passes at a time.

    A pass asks the store for what it would remove, and for what that rests on: the newest stable ones, the best, and
    where a rollback goes back to. What stays whatever these are is taken for what it was found to be; in each pass it
    is the turn of a few of them to be looked at, to see whether one has been unpinned, or found damaged. So however
    many are kept, a pass makes as many requests. Only the first one of a process looks at all.
    """

    def __init__(
        self,
        store: Store,
        config: RetentionConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        undo_steps: int = 0,
    ) -> None:
        """Args: undo_steps: as for `judge`."""
        self._store = store
        self._config = config
        self._undo_steps = undo_steps
        self._clock = clock
        self._expired_at: dict[CheckpointRef, float] = {}
        self._abandoned_at: dict[CheckpointRef, float] = {}
        self._known: dict[CheckpointRef, CheckpointInfo] = {}
        """From the pass before, without what is not judged by: in a run that is saved every few seconds hundreds wait
        for the end of their grace period, and each commit asks for a pass."""
        self._swept_for, self._sweep_at = 0, 0.0
        """On behalf of which attempt unfinished uploads were looked for, and when to do it again."""
        self._upload_due: float | None = None
        """When the next one may go, if some wait."""
        self._settled: list[CheckpointRef] = []
        """Those of them that stay, and decide about no other; first those that were not looked at for the longest."""

    def prune(self, attempt: int, report: Callable[[Removal], None]) -> float | None:
        """One pass: mark what has become superfluous, remove what was marked long enough ago.

        Last, it removes what uploads of attempts that are over have left behind unfinished.

        Args:
            report: told of every checkpoint that is gone.

        Returns:
            Seconds until another pass has something to remove; None: nothing waits.

        Raises:
            SupersededError: a newer attempt owns the run; it prunes.
            UnbrokenError: the store failed. The next pass goes on where this one ended.
        """
        began = self._clock()
        verdicts = self._judged(attempt)
        gone = [verdict for verdict in verdicts if not verdict.keep]
        for verdict in verdicts:
            if verdict.keep and verdict.info.expired:  # pinned meanwhile, or a newer one turned out damaged
                check_not_superseded(self._store, attempt)
                self._store.delete(verdict.info.ref.expired)
        self._expired_at = {v.info.ref: at for v in gone if (at := self._expired_at.get(v.info.ref)) is not None}
        waits = [self._remove(verdict, attempt, began, report) for verdict in gone]
        self._unmark({v.info.ref for v in verdicts if v.keep and v.info.state is CheckpointState.ABANDONED}, attempt)
        waits += self._sweep_uploads(attempt)
        return min((wait for wait in waits if wait), default=None)

    def _judged(self, attempt: int) -> list[Verdict]:
        """A verdict on each checkpoint; those that are not to stay, and all that decide about them, have been seen."""
        trusted = set(self._settled[_LOOKS:])
        found = {info.ref: _slim(info) for info in scan_checkpoints(self._store, self._known, trusted)}
        while True:
            verdicts = judge(found.values(), self._config, attempt, self._undo_steps)
            doubted = decisive(found.values(), self._config, self._undo_steps)
            doubted |= {verdict.info.ref for verdict in verdicts if not verdict.keep}
            if not (again := trusted & doubted):
                break
            trusted -= again
            for ref in again:
                if (info := look(self._store, ref, found[ref])) is not None:
                    found[ref] = _slim(info)
                else:
                    del found[ref]
        self._known = found
        settled = {v.info.ref for v in verdicts if v.keep and v.info.state in _COMMITTED and not v.info.expired}
        waiting = [ref for ref in self._settled if ref in trusted]
        self._settled = [ref for ref in (*waiting, *sorted(settled - trusted)) if ref in settled - doubted]
        return verdicts

    def _sweep_uploads(self, attempt: int) -> list[float]:
        """Seconds until others that are unfinished may go. Not each time: a folder on a disk is searched as a whole."""
        now = self._clock()
        if attempt == self._swept_for and now < self._sweep_at:
            return [] if self._upload_due is None else [self._upload_due - now]
        waits = []
        for upload in self._store.unfinished_uploads():
            wait = _patience_s(self._store.upload_key(upload), attempt, self._config) - upload.age_s
            if wait <= 0:
                check_not_superseded(self._store, attempt)
                self._store.abort_upload(upload)
            elif wait < _UPLOAD_S / 2:  # else the pass after some later save will see to it
                waits.append(wait)
        self._swept_for, self._upload_due = attempt, now + min(waits) if waits else None
        self._sweep_at = now + min((_SWEEP_EVERY_S, *waits))
        return waits

    def _remove(self, verdict: Verdict, attempt: int, began: float, report: Callable[[Removal], None]) -> float:
        """Seconds until it may be removed; 0 if that has been done.

        The grace period has to be over when the pass begins, not now: the verdict is as old as that, and who pins a
        checkpoint may have looked at it until the mark was there.
        """
        info = verdict.info
        check_not_superseded(self._store, attempt)
        if info.state not in _UNREADABLE:
            if not info.expired:
                self._expired_at.pop(info.ref, None)  # whatever took an earlier mark away, readers may have begun
                expire(self._store, info.ref, verdict.reason)
            if info.ref not in self._expired_at:
                age_s = self._age_s(info)
                self._expired_at[info.ref] = self._clock() - age_s
            wait = self._expired_at[info.ref] + self._config.grace_s - began
            if self._config.grace_s and wait > 0:
                return wait
        if remove(self._store, info, attempt):
            report(Removal(ref=info.ref, reason=verdict.reason))
        return 0.0

    def _unmark(self, abandoned: Collection[CheckpointRef], attempt: int) -> None:
        """Remove the marks that are old enough and all that is left of their checkpoints. No pass is due for that."""
        self._abandoned_at = {ref: at for ref, at in self._abandoned_at.items() if ref in abandoned}
        for ref in abandoned:
            if ref not in self._abandoned_at and (age_s := self._store.age_s(ref.manifest)) is not None:
                self._abandoned_at[ref] = self._clock() - max(0.0, age_s)
            if self._clock() - self._abandoned_at.get(ref, self._clock()) >= _UPLOAD_S:
                check_not_superseded(self._store, attempt)
                self._store.delete(ref.manifest)

    def _age_s(self, info: CheckpointInfo) -> float:
        """Of the mark."""
        if not info.expired:
            return 0.0  # it was not there when we looked
        return max(0.0, self._store.age_s(info.ref.expired) or 0.0)  # below 0: somebody has set the clock back


def _slim(info: CheckpointInfo) -> CheckpointInfo:
    """With as much of the manifest as a verdict needs."""
    manifest = info.manifest
    if manifest is None or not manifest.files:
        return info
    return replace(info, manifest=replace(manifest, tensors={}, files=(), scalars={}, versions={}, store={}))


def _patience_s(key: str, attempt: int, config: RetentionConfig) -> float:
    """How old an unfinished upload must be to be nobody's any more."""
    ref = CheckpointRef.parse(f"{key}/".split("/")[1]) if key.startswith(f"{keys.CHECKPOINTS}/") else None
    # What an older attempt is still uploading can not be committed any more, so nothing is lost by it.
    return config.grace_s if ref is not None and ref.attempt < attempt else _UPLOAD_S


def expire(store: Store, ref: CheckpointRef, reason: str) -> None:
    """Mark a checkpoint as one that nobody may begin to read."""
    with suppress(AlreadyExistsError):
        store.create(ref.expired, records.encode({"reason": reason, "expired_at": records.now()}))


def remove(store: Store, info: CheckpointInfo, attempt: int) -> bool:
    """Delete the files of a checkpoint in the safe order; False if it turned out to be committed after all."""
    ref, last = info.ref, keys.EXPIRED_NAME
    if info.state in (CheckpointState.WRITING, CheckpointState.ABANDONED):
        closed = abandon(store, ref, attempt) if info.state is CheckpointState.WRITING else info
        if closed is None or closed.state is not CheckpointState.ABANDONED:
            return False
        last = keys.MANIFEST_NAME  # holds no manifest, and stays
    else:
        store.delete(ref.manifest)  # first: see above
    for name in info.names:
        if name not in (keys.MANIFEST_NAME, last):
            store.delete(ref.file(name))
    if last == keys.EXPIRED_NAME:
        store.delete(ref.expired)
    return True


def claim_fields(config: RetentionConfig, undo_steps: int = 0) -> dict[str, Any]:
    """What an attempt says of its configuration when it is claimed, so that commands keep to it."""
    return {_CLAIM_FIELD: asdict(config), _UNDO_FIELD: undo_steps}


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """What the newest attempt of a run keeps to."""

    attempt: int = 0
    """Its number; 0: there is none yet."""
    config: RetentionConfig = field(default_factory=RetentionConfig)
    undo_steps: int = 0
    """How many steps it may undo; 0 if it does not say."""

    @classmethod
    def of(cls, store: Store) -> Claimed:
        """Raises UnbrokenError: the claim is damaged, or the store could not be read."""
        attempt = newest_attempt(store)
        if not attempt:
            return cls()
        said = records.load(store, keys.attempt_key(attempt))
        config = decode(RetentionConfig, said.get(_CLAIM_FIELD, {}))
        return cls(attempt=attempt, config=config, undo_steps=int(said.get(_UNDO_FIELD, 0)))


def pin(store: Store, ref: CheckpointRef, reason: str) -> bool:
    """Keep a checkpoint whatever the policy says; False if it was pinned already, with the reason it had.

    Of one that is not marked as expired yet, no removal can be under way: that begins `grace_s` after the mark, and
    looks at the pins first.
    """
    try:
        store.create(ref.pin, records.encode({"reason": reason, "pinned_at": records.now()}))
    except AlreadyExistsError:
        return False
    return True


def unpin(store: Store, ref: CheckpointRef) -> None:
    """Leave a checkpoint to the policy again."""
    store.delete(ref.pin)
