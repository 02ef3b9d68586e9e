"""What rank 0 does with what an evaluation found: events, the numbers of a checkpoint, pictures in storage."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.checkpoint.keys import grid_key
from orchestrator.coordination.committing import Chores, Picture
from orchestrator.coordination.save_round import SaveRound
from orchestrator.messages.evaluations import Drew, Evaluated, Validated


class EvaluationLog:
    """One for each coordinator; fed by it."""

    def __init__(self, save: SaveRound, chores: Chores, event: Callable[..., None]) -> None:
        """Args: event: reports; called with the event's kind and its fields."""
        self._save = save
        self._chores = chores
        self._event = event

    def take(self, attempt: int, message: Validated | Drew | Evaluated) -> None:
        """Report it. A picture is reported when it is stored."""
        at = {"attempt": attempt, "step": message.progress.step}
        match message:
            case Validated(progress=progress, metrics=metrics):
                self._save.join(progress, {f"validation/{name}": value for name, value in metrics.items()})
                self._event("validation", **at, metrics=dict(metrics))
            case Drew(progress=progress, weights=weights, png=png):
                self._chores.keep(
                    Picture(key=grid_key(weights, progress.step), png=png, fields={**at, "title": weights})
                )
            case Evaluated(seconds=seconds):
                self._event("evaluated", **at, seconds=seconds)
