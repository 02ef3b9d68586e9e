"""Which checkpoints a run has, and which of them counts. Found by listing, never by a pointer that could be stale."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, DamagedCheckpointError, MissingObjectError, UnbrokenError
from trainers.progress import Progress

_ABANDONED = b'{\n  "abandoned_by": '
"""How what `abandon` puts in the place of a manifest begins."""


class CheckpointState(StrEnum):
    WRITING = "writing"
    """No manifest: unfinished, or left behind by a dead attempt."""
    ABANDONED = "abandoned"
    """Closed by a newer attempt before it was committed: it can never be."""
    STABLE = "stable"
    """Committed, and so read back and verified at that time; healthy; whole; not quarantined."""
    UNHEALTHY = "unhealthy"
    """Committed, but the state in it is not one to go on from."""
    DAMAGED = "damaged"
    """The manifest is not what was written, or a file is missing."""
    QUARANTINED = "quarantined"
    """Found damaged by a reader, and marked."""
    EXPIRED = "expired"
    """Its removal has begun: the manifest is gone."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint as found in storage."""

    ref: CheckpointRef
    state: CheckpointState
    detail: str = ""
    """Why it is damaged, unhealthy or quarantined."""
    manifest: Manifest | None = None
    """Present if stable or unhealthy."""
    names: tuple[str, ...] = ()
    """What lies in its folder."""
    pinned: str | None = None
    """Why somebody wants it kept, if so."""

    @property
    def step(self) -> int:
        """Of a stable or unhealthy one."""
        assert self.manifest is not None, self.ref
        return self.manifest.progress.step

    @property
    def progress(self) -> Progress:
        """Of a stable or unhealthy one."""
        assert self.manifest is not None, self.ref
        return self.manifest.progress

    @property
    def expired(self) -> bool:
        """Whether it is about to be removed. Who reads it already may finish, nobody may begin."""
        return keys.EXPIRED_NAME in self.names


Known = Mapping[CheckpointRef, CheckpointInfo]
_NOTHING: Known = {}


def scan_checkpoints(
    store: Store, known: Known = _NOTHING, trusted: Collection[CheckpointRef] = ()
) -> Iterator[CheckpointInfo]:
    """Every checkpoint, newest first, each looked at when it is asked for.

    Args:
        known: what an earlier call found. No object is written twice, so where the same names are there, nothing is
            read again.
        trusted: of these what is known is taken for true, and nothing is asked; but they are listed.
    """
    refs = [CheckpointRef.parse(name) for name in store.list(keys.CHECKPOINTS)]
    for ref in sorted((ref for ref in refs if ref is not None), reverse=True):
        info = known[ref] if ref in trusted else look(store, ref, known.get(ref))
        if info is not None:
            yield info


def list_checkpoints(store: Store, known: Known = _NOTHING) -> list[CheckpointInfo]:
    """Every checkpoint, newest first; `known` as for `scan_checkpoints`."""
    return list(scan_checkpoints(store, known))


def newest_stable(store: Store) -> CheckpointInfo | None:
    """The checkpoint to go on from, with its manifest; None if there is none.

    Raises:
        StorageError: it could not be looked up. That is not the same as None.
    """
    return next((info for info in scan_checkpoints(store) if info.state is CheckpointState.STABLE), None)


def take_over(store: Store, attempt: int) -> Iterator[CheckpointInfo]:
    """As `scan_checkpoints`, but older attempts can commit nothing any more that is newer than what was yielded.

    To be called after `attempt` was claimed. An older attempt that has not checked yet whether it is superseded will
    find that it is. One that has, and is about to create its manifest, has all its shards in place; so its checkpoint
    is listed, and closed here before anything older is yielded.
    """
    for info in scan_checkpoints(store):
        if info.state is CheckpointState.WRITING and info.ref.attempt < attempt:
            info = abandon(store, info.ref, attempt)
        if info is not None:
            yield info


def abandon(store: Store, ref: CheckpointRef, attempt: int) -> CheckpointInfo | None:
    """Take the place of a manifest that was never written, so that it never will be; what the checkpoint is then.

    If it was committed in the meantime, it is stable, as it is with any other commit.
    """
    claim = {"abandoned_by": attempt, "at": records.now(), "token": uuid.uuid4().hex}
    with suppress(AlreadyExistsError):
        store.create(ref.manifest, records.encode(claim))
    return look(store, ref)


def load_manifest(store: Store, ref: CheckpointRef) -> Manifest:
    """The manifest of a checkpoint, checked to be intact, whole, and the one of this checkpoint.

    Raises:
        MissingObjectError: it was never committed.
        DamagedCheckpointError: it is not what was written.
    """
    return _parse(store, ref, store.read(ref.manifest))


def quarantine(store: Store, ref: CheckpointRef, reason: str, attempt: int) -> None:
    """Mark a checkpoint as not to be loaded. The first reason stays."""
    marker = {"reason": reason, "attempt": attempt, "quarantined_at": records.now()}
    with suppress(AlreadyExistsError):
        store.create(ref.quarantine, records.encode(marker))


def look(store: Store, ref: CheckpointRef, known: CheckpointInfo | None = None) -> CheckpointInfo | None:
    """One checkpoint, None if nothing is there; `known` as for `scan_checkpoints`, of this one."""
    names = tuple(map(sys.intern, store.list(ref.folder)))  # the same in all folders, and some callers keep them
    if not names:
        return None  # a folder is all that a disk keeps of a removed checkpoint
    if known is not None and known.names == names:
        return known
    pinned = _reason(store, ref.pin) if keys.PIN_NAME in names else None
    state, detail, manifest = _examine(store, ref, names)
    return CheckpointInfo(ref=ref, state=state, detail=detail, manifest=manifest, names=names, pinned=pinned)


def _examine(store: Store, ref: CheckpointRef, names: tuple[str, ...]) -> tuple[CheckpointState, str, Manifest | None]:
    """State, detail, and the manifest if it is of use."""
    if keys.MANIFEST_NAME not in names and keys.EXPIRED_NAME in names:
        return CheckpointState.EXPIRED, "", None
    if keys.QUARANTINE_NAME in names:
        return CheckpointState.QUARANTINED, _reason(store, ref.quarantine), None
    if keys.MANIFEST_NAME not in names:
        return CheckpointState.WRITING, "", None
    try:
        data = store.read(ref.manifest)
    except MissingObjectError:
        return CheckpointState.EXPIRED, "", None  # removed while we looked
    if data.startswith(_ABANDONED):
        return CheckpointState.ABANDONED, "", None
    try:
        manifest = _parse(store, ref, data)
    except DamagedCheckpointError as error:
        return CheckpointState.DAMAGED, str(error), None
    # Asked for by name, too: that a store lists late what it has is no damage.
    absent = sorted({file.name for file in manifest.files}.difference(names))
    if (missing := next((name for name in absent if not store.exists(ref.file(name))), None)) is not None:
        return CheckpointState.DAMAGED, f"{store.url}/{ref.file(missing)} is missing", None
    if not manifest.health["ok"]:
        return CheckpointState.UNHEALTHY, str(manifest.health), manifest
    return CheckpointState.STABLE, "", manifest


def _parse(store: Store, ref: CheckpointRef, data: bytes) -> Manifest:
    manifest = Manifest.from_bytes(data, f"{store.url}/{ref.manifest}")
    if manifest.ref != ref:
        raise DamagedCheckpointError(f"{store.url}/{ref.manifest} is the manifest of checkpoint {manifest.ref}")
    return manifest


def _reason(store: Store, key: str) -> str:
    try:
        return str(records.load(store, key)["reason"])
    except (UnbrokenError, KeyError) as error:  # the marker's presence is what counts
        return f"the marker itself cannot be read: {error}"
