"""What a row could not find out here, and why: told in its place, so that nobody takes silence for a figure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NotMeasured:
    """In one line."""

    name: str
    reason: str
