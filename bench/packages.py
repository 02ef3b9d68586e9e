"""What of the extra `bench` is there."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

INSTALL = "not installed: pip install -e '.[bench]'"


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of each distribution, or what to do about it."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return INSTALL
