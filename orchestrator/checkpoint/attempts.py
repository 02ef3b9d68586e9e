"""Attempts: every (re)start of the workers claims the next number. The newest one owns the run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, StorageError, SupersededError, UnbrokenError


def claim_attempt(store: Store, info: Mapping[str, Any]) -> int:
    """A number that no other claimer got and that is greater than every one claimed before; the first is 1.

    From here on all older attempts are superseded: they stop at their next commit.

    Args:
        info: stored with the claim, for people and reports (host, process, reason, ...).
    """
    attempt = newest_attempt(store)
    while True:
        attempt += 1
        # The token makes our bytes unlike those of a claimer that races us; see Store.create.
        claim = {"attempt": attempt, "claimed_at": records.now(), "token": uuid.uuid4().hex, **info}
        try:
            store.create(keys.attempt_key(attempt), records.encode(claim))
        except AlreadyExistsError:
            continue
        return attempt


def newest_attempt(store: Store) -> int:
    """The newest claimed number; 0 if there is none."""
    return max(_claimed(store), default=0)


def read_attempts(store: Store) -> Iterator[dict[str, Any]]:
    """What every attempt stored at its claim, newest first, each read when it is asked for: a long run has thousands.

    Raises StorageError as `read_attempt` does.
    """
    return (read_attempt(store, attempt) for attempt in sorted(_claimed(store), reverse=True))


def read_attempt(store: Store, attempt: int) -> dict[str, Any]:
    """What an attempt stored at its claim.

    Of a damaged one there is the number alone. That is what fences. The rest is for reports and budgets: a flipped bit
    in it must not keep a run from going on.

    Raises:
        StorageError: the store could not be read, or there is none.
    """
    try:
        return records.load(store, keys.attempt_key(attempt))
    except StorageError:
        raise
    except UnbrokenError:
        return {"attempt": attempt}


def check_not_superseded(store: Store, attempt: int) -> None:
    """Return if `attempt` is the newest.

    Raises:
        SupersededError: a newer attempt owns the run.
    """
    newest = newest_attempt(store)
    if newest > attempt:
        raise SupersededError(f"attempt {attempt} of {store.url} is superseded by attempt {newest}; it stops here")


def _claimed(store: Store) -> list[int]:
    numbers = [keys.parse_attempt(name) for name in store.list(keys.ATTEMPTS)]
    return [number for number in numbers if number is not None]
