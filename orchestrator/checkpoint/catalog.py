"""Which checkpoints a run has, and which of them counts. Found by listing, never by a pointer that could be stale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, DamagedCheckpointError, UnbrokenError


class CheckpointState(StrEnum):
    WRITING = "writing"
    """No manifest: unfinished, or left behind by a dead attempt."""
    STABLE = "stable"
    """Committed, and so read back and verified at that time; healthy; not quarantined."""
    UNHEALTHY = "unhealthy"
    """Committed, but the state in it is not one to go on from."""
    DAMAGED = "damaged"
    """The manifest is not what was written."""
    QUARANTINED = "quarantined"
    """Found damaged by a reader, and marked."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint as found in storage."""

    ref: CheckpointRef
    state: CheckpointState
    detail: str = ""
    """Why it is damaged, unhealthy or quarantined."""
    manifest: Manifest | None = None
    """Present if stable or unhealthy."""


def scan_checkpoints(store: Store) -> Iterator[CheckpointInfo]:
    """Every checkpoint, newest first, each looked at when it is asked for."""
    refs = [CheckpointRef.parse(name) for name in store.list(keys.CHECKPOINTS)]
    for ref in sorted((ref for ref in refs if ref is not None), reverse=True):
        yield _look(store, ref)


def list_checkpoints(store: Store) -> list[CheckpointInfo]:
    """Every checkpoint, newest first."""
    return list(scan_checkpoints(store))


def newest_stable(store: Store) -> CheckpointInfo | None:
    """The checkpoint to go on from, with its manifest; None if there is none.

    Raises:
        StorageError: it could not be looked up. That is not the same as None.
    """
    return next((info for info in scan_checkpoints(store) if info.state is CheckpointState.STABLE), None)


def load_manifest(store: Store, ref: CheckpointRef) -> Manifest:
    """The manifest of a checkpoint, checked to be intact, whole, and the one of this checkpoint.

    Raises:
        MissingObjectError: it was never committed.
        DamagedCheckpointError: it is not what was written.
    """
    manifest = Manifest.from_bytes(store.read(ref.manifest), f"{store.url}/{ref.manifest}")
    if manifest.ref != ref:
        raise DamagedCheckpointError(f"{store.url}/{ref.manifest} is the manifest of checkpoint {manifest.ref}")
    return manifest


def quarantine(store: Store, ref: CheckpointRef, reason: str, attempt: int) -> None:
    """Mark a checkpoint as not to be loaded. The first reason stays."""
    marker = {"reason": reason, "attempt": attempt, "quarantined_at": records.now()}
    try:
        store.create(ref.quarantine, records.encode(marker))
    except AlreadyExistsError:
        return


def _look(store: Store, ref: CheckpointRef) -> CheckpointInfo:
    names = store.list(ref.folder)
    if keys.QUARANTINE_NAME in names:
        return CheckpointInfo(ref=ref, state=CheckpointState.QUARANTINED, detail=_quarantine_reason(store, ref))
    if keys.MANIFEST_NAME not in names:
        return CheckpointInfo(ref=ref, state=CheckpointState.WRITING)
    try:
        manifest = load_manifest(store, ref)
    except DamagedCheckpointError as error:
        return CheckpointInfo(ref=ref, state=CheckpointState.DAMAGED, detail=str(error))
    if not manifest.health["ok"]:
        detail = str(manifest.health)
        return CheckpointInfo(ref=ref, state=CheckpointState.UNHEALTHY, detail=detail, manifest=manifest)
    return CheckpointInfo(ref=ref, state=CheckpointState.STABLE, manifest=manifest)


def _quarantine_reason(store: Store, ref: CheckpointRef) -> str:
    try:
        return str(records.load(store, ref.quarantine)["reason"])
    except (UnbrokenError, KeyError) as error:  # the marker's presence is what counts
        return f"the marker itself cannot be read: {error}"
