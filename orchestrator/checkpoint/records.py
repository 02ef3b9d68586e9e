"""Small JSON documents beside the checkpoints: the run, its attempts, quarantine markers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError


def encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load(store: Store, key: str) -> dict[str, Any]:
    """The document at `key`.

    Raises:
        MissingObjectError: there is none.
        UnbrokenError: it is no JSON object.
    """
    data = store.read(key)
    try:
        document = json.loads(data)
    except ValueError as error:
        raise UnbrokenError(f"{store.url}/{key} is damaged ({error}); restore or repair this file by hand") from error
    if not isinstance(document, dict):
        raise UnbrokenError(f"{store.url}/{key} is damaged (not a JSON object); restore or repair this file by hand")
    return document


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
