"""`run.json`: what a run is, written once by its first start and never changed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.store import Store
from orchestrator.errors import (
    AlreadyExistsError,
    MissingObjectError,
    RunMismatchError,
    RunNotFoundError,
    StorageError,
    UnbrokenError,
)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The identity of a run."""

    run_id: str
    """12 hex digits, unlike those of any other run."""
    created_at: str
    """UTC, ISO 8601."""
    config: Mapping[str, Any]
    """The configuration it was first started with."""


def open_or_create(store: Store, config: Mapping[str, Any]) -> RunRecord:
    """The record of the run at `store`; the first caller creates it with its `config`, all others get that one."""
    try:
        return load(store)
    except RunNotFoundError:
        record = RunRecord(run_id=uuid.uuid4().hex[:12], created_at=records.now(), config=config)
    try:
        store.create(keys.RUN_RECORD, records.encode(asdict(record)))
    except AlreadyExistsError:
        return load(store)
    return record


def load(store: Store) -> RunRecord:
    """The record of the run at `store`.

    Raises:
        RunNotFoundError: there is none.
        RunMismatchError: it is no run but an export, or of a newer version.
        UnbrokenError: it is damaged.
    """
    try:
        document = records.load(store, keys.RUN_RECORD)
    except StorageError as error:
        if not isinstance(error, MissingObjectError) and not isinstance(error.__cause__, NotADirectoryError):
            raise
        is_folder = isinstance(error, MissingObjectError)  # and no file
        if store.url.endswith(".safetensors") or (is_folder and store.exists(keys.EXPORT_RECORD)):
            raise RunMismatchError(
                f"{store.url} is an export: weights alone, without the optimizer's state, the position in the data and"
                " the other averages, so no run can go on from it. To train on from these weights, start a new run with"
                " model.pretrained set to it (a single file: `unbroken unpack` first)"
            ) from error
        raise RunNotFoundError(
            f"no run at {store.url}: it has no {keys.RUN_RECORD}; a RUN is `<storage>/<run.name>`, and"
            " `unbroken runs list STORAGE` shows all there are"
        ) from error
    if newer := document.keys() - {field.name for field in fields(RunRecord)}:
        raise RunMismatchError(
            f"{store.url}/{keys.RUN_RECORD} is of a newer version of unbroken, this one does not know its"
            f" {', '.join(sorted(newer))}; update unbroken"
        )
    try:
        record = RunRecord(**document)
        if not isinstance(record.config, Mapping):
            raise TypeError("its config is no section")
        return record
    except TypeError as error:
        raise UnbrokenError(f"{store.url}/{keys.RUN_RECORD} is damaged ({error}); restore this file by hand") from error
