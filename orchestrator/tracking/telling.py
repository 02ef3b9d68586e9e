"""The events of a run as lines for people, as `unbroken train` wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from orchestrator.messages.attempts import Event
from orchestrator.screen import Screen

_QUIET = frozenset({"step", "alive", "trainer", "reached", "training", "snapshot", "down", "store"})
"""Kinds that tell a person nothing that another does not."""
_TEXTS = {
    "started": "a driver starts on {host}, process {pid}: {num_steps} steps, workers {workers}",
    "saved": "checkpoint of step {step} is committed: {size}, by attempt {attempt}",
    "outcome": "{ending}: {message}",
}


def told(events: Iterable[Event], num_steps: int, global_batch_size: int) -> Iterator[tuple[float, str]]:
    """Unix time and text of the events that are worth a line."""
    lines: list[str] = []
    screen = Screen(num_steps, global_batch_size, lines.append)
    for event in events:
        if event.kind not in _QUIET:
            fields = {key: value for key, value in event.fields.items() if key not in ("session", "writer")}
            lines.clear()
            _tell(replace(event, fields=fields), screen, lines)
            yield from ((event.time_s, line) for line in lines)


def _tell(event: Event, screen: Screen, lines: list[str]) -> None:
    """Args: lines: where `screen` writes."""
    fields = event.fields
    if event.kind in _TEXTS:
        size = f"{fields['bytes'] / 1e6:,.1f} MB" if "bytes" in fields else "?"
        return lines.append(_TEXTS[event.kind].format_map(_Lenient(fields, size=size)))
    if hasattr(screen, f"_{event.kind}"):
        try:
            return screen.show(event)
        except (KeyError, TypeError):  # with the fields of another version, or one whose name has a wrong bit
            lines.clear()
    lines.append(f"{event.kind}: {', '.join(f'{key} {value}' for key, value in fields.items())}")


class _Lenient(dict[str, Any]):
    """A field that an event of another version lacks is a question mark."""

    def __missing__(self, key: str) -> str:
        return "?"
