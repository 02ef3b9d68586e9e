"""Attempts: every (re)start of the workers claims the next number. The newest one owns the run."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, StorageError, SupersededError, UnbrokenError


def claim_attempt(
    store: Store,
    info: Mapping[str, Any],
    after: int | None = None,
    own: Callable[[Mapping[str, Any]], bool] = lambda claim: False,
) -> int:
    """A number that no other claimer got and that is greater than every one claimed before; the first is 1.

    From here on all older attempts are superseded: they stop at their next commit. Numbers leave no gap, as each is
    created only if absent; so with `after` nobody can have claimed one in between, whatever the store lists, and when.

    Args:
        info: stored with the claim, for people and reports (host, process, reason, ...).
        after: an attempt of the claimer's own, which goes on from it; None: it takes the run over from anybody.
        own: whether a claim that is newer than `after` is the claimer's own, too: it may have heard of none of it.

    Raises:
        SupersededError: somebody else has claimed an attempt since `after`; nothing was claimed.
    """
    attempt = newest_attempt(store) if after is None else after
    while True:
        attempt += 1
        # The token makes our bytes unlike those of a claimer that races us; see Store.create.
        claim = {"attempt": attempt, "claimed_at": records.now(), "token": uuid.uuid4().hex, **info}
        try:
            store.create(keys.attempt_key(attempt), records.encode(claim))
        except AlreadyExistsError:
            if after is not None and not own(read_attempt(store, attempt)):
                raise _superseded(store, after, attempt) from None
            continue
        return attempt


def newest_attempt(store: Store) -> int:
    """The newest claimed number; 0 if there is none."""
    return max(_claimed(store), default=0)


def read_attempts(store: Store, after: int = 0) -> Iterator[dict[str, Any]]:
    """What every attempt stored at its claim, newest first, each read when it is asked for: a long run has thousands.

    Args:
        after: only those with greater numbers.

    Raises StorageError as `read_attempt` does.
    """
    return (read_attempt(store, attempt) for attempt in sorted(_claimed(store), reverse=True) if attempt > after)


def read_attempt(store: Store, attempt: int) -> dict[str, Any]:
    """What an attempt stored at its claim.

    Of a damaged one there is the number alone. That is what fences. The rest is for reports and budgets: a flipped bit
    in it must not keep a run from going on.

    Raises:
        StorageError: the store could not be read, or there is none.
    """
    try:
        return {**records.load(store, keys.attempt_key(attempt)), "attempt": attempt}
    except StorageError:
        raise
    except UnbrokenError:
        return {"attempt": attempt}


def check_not_superseded(store: Store, attempt: int) -> None:
    """Return if `attempt` is the newest.

    The next one is looked for by its name, as a store may list late what it has; those after it by listing, as the
    memory of the nodes may have lost the next one.

    Raises:
        SupersededError: a newer attempt owns the run.
    """
    newer = attempt + 1
    if store.exists(keys.attempt_key(newer)) or (newer := newest_attempt(store)) > attempt:
        raise _superseded(store, attempt, newer)


def _superseded(store: Store, attempt: int, newer: int) -> SupersededError:
    return SupersededError(f"attempt {attempt} of {store.url} is superseded by attempt {newer}; it stops here")


def _claimed(store: Store) -> list[int]:
    numbers = [keys.parse_attempt(name) for name in store.list(keys.ATTEMPTS)]
    return [number for number in numbers if number is not None]
