"""`--json`: what a command found out or made, as one JSON document that is alone on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import click

JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; all else goes to stderr.")


def print_json(document: Mapping[str, Any] | Sequence[Any], indent: int | None = 2) -> None:
    """Args: indent: None puts it on one line."""
    click.echo(json.dumps(_plain(document), indent=indent, allow_nan=False, default=str))


def _plain(value: Any) -> Any:
    """`value` with null for what JSON has no number for."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
    return value
