"""Every parameter has a gradient in every microbatch, or in none: whatever else a model does is refused.

FSDP reduces what has a gradient, so what lies where in a unit's gradient depends on it; and an optimizer counts the
updates of each parameter, of which a checkpoint has one count for all.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from trainers.errors import ConfigError

_Seen = TypeVar("_Seen")


class Steady(Generic[_Seen]):
    """Of one unit, or of the whole model: what has a gradient, as far as it can be seen there."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def check(self, seen: _Seen) -> None:
        """Raises ConfigError if it is not what it was before, in the life of this process. Local."""
        if self._seen is not None and seen != self._seen:
            raise ConfigError(
                "model: some parameters take part in some microbatches or steps only, so numbers would depend on"
                " workers and restarts; choose a model that uses all of its parameters every time"
            )
        self._seen = seen
