"""All runs of a storage, each from its newest events alone: quick where there are many."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint import run_record
from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.keys import EVENTS, RUN_RECORD
from orchestrator.checkpoint.storage_failures import DeadlineError
from orchestrator.checkpoint.store import Store
from orchestrator.errors import RunMismatchError, RunNotFoundError, StorageError, UnbrokenError
from orchestrator.tracking.overview import Present, State
from orchestrator.tracking.record import RowsReader, in_order

_ENOUGH_EVENTS = 64
_MOST_EVENTS = 1000
"""To read for the newest `train.num_steps`; if it was set longer ago, that of the first start is shown."""
_PARALLEL_RUNS = 16


@dataclass(frozen=True, kw_only=True)
class Glance:
    """Where a run stands."""

    url: str
    state: str
    """As `unbroken status` says it, or `damaged`, `unreadable` or `of another version`."""
    step: int = 0
    num_steps: int = 0
    newest_stable: str | None = None
    """The checkpoint that the run would go on from."""
    newest_stable_step: int | None = None
    since_s: float | None = None
    """Unix time of the last sign of life; None: there was none."""
    why: str = ""
    """The reason of an end, or why it cannot be read; empty otherwise."""


def glance_at_runs(url: str) -> Iterator[Glance]:
    """The runs in the storage at `url`, in order of their names; what is no run is passed over.

    Raises:
        RunNotFoundError: it is a file.
        StorageError: the store could not be read.
    """
    try:
        names = Store.reach(url).list("")
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            raise RunNotFoundError(f"{url} is a file; give the folder or URL that has runs in it") from error
        raise
    with ThreadPoolExecutor(_PARALLEL_RUNS) as pool:
        found = pool.map(lambda name: glance(f"{url.rstrip('/')}/{name}"), names)
        yield from (one for one in found if one is not None)


def glance(url: str, now_s: float | None = None) -> Glance | None:
    """The run at `url`; None if there is none.

    Raises:
        StorageError: the store does not answer any more.
    """
    store = Store.open(url)
    try:
        config: Mapping[str, Any] = run_record.load(store).config
        newest = newest_stable(store)
        present = _present(store, time.time() if now_s is None else now_s)
    except RunNotFoundError:
        return None
    except StorageError as error:
        if isinstance(error.__cause__, DeadlineError):
            raise
        return Glance(url=store.url, state="unreadable", why=str(error))  # a folder of somebody else, for example
    except UnbrokenError as error:
        if not store.exists(RUN_RECORD):
            return None  # an export
        state = "of another version" if isinstance(error, RunMismatchError) else "damaged"
        return Glance(url=store.url, state=state, why=str(error))
    at = newest.manifest.progress.step if newest and newest.manifest else None
    return Glance(
        url=store.url,
        state=str(present.state),
        step=max(present.step, at or 0),
        num_steps=present.num_steps or config.get("train", {}).get("num_steps", 0),
        newest_stable=str(newest.ref) if newest else None,
        newest_stable_step=at,
        since_s=present.last_s,
        why=present.why,
    )


def _present(store: Store, now_s: float) -> Present:
    """Read back from the newest event to the last one that decides the state, and a little further for the rest."""
    reader, enough = RowsReader(store, EVENTS), _ENOUGH_EVENTS
    while True:
        present = Present(in_order(reader.rows(enough)), now_s)
        known = present.state is not State.NOT_STARTED and (present.num_steps or enough >= _MOST_EVENTS)
        if known or reader.complete:
            return present
        enough *= 4
