"""What a store can do, found by trying: does create-if-absent, on which the commit stands, really refuse?"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from orchestrator.checkpoint import keys
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, StorageError, UnknownOutcomeError


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What was found; goes into every manifest."""

    kind: str
    """`local`, `s3`, or the protocol."""
    conditional_create: bool
    """Whether the store itself lets one of several creators of a key win."""

    @property
    def warning(self) -> str | None:
        """What is lost, in one line."""
        if self.conditional_create:
            return None
        return (
            f"this {self.kind} store has no create-if-absent: each commit takes 2 s more, and of two drivers on one run"
            " both may go on if a request takes longer than that; never start a run twice at a time, or use another"
            " store"
        )


def probe(store: Store) -> StoreFacts:
    """Create a key twice, look which content it holds, remove it; sets `store.conditional_create` to what was found.

    Raises:
        StorageError: the store cannot be used, and why.
        UnknownOutcomeError: it did not answer.
    """
    key, another = (keys.probe_key(uuid.uuid4().hex) for _ in range(2))
    store.conditional_create = True
    try:
        refused = _refuses(store, key)
    except (StorageError, UnknownOutcomeError):
        store.write(key, [b"only"])  # it may only dislike the condition; if it cannot write at all, that is the error
        store.delete(key)
        # Or it was away for a moment. That must not cost the run the condition, and other drivers their claims.
        try:
            refused = _refuses(store, another)
        except (StorageError, UnknownOutcomeError):
            refused = False
    store.conditional_create = refused
    return StoreFacts(kind=store.backend.kind, conditional_create=refused)


def _refuses(store: Store, key: str) -> bool:
    """Whether the second of two creators is refused, and the first one's content stays."""
    first, second = b"first", b"second"  # an empty body would prove nothing
    store.create(key, first)
    try:
        store.create(key, second)
        refused = False
    except AlreadyExistsError:
        refused = store.read(key) == first
    store.delete(key)
    return refused
