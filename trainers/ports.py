"""What the training loop needs from whoever runs it: three small ports, no hooks, no back-references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainers.progress import Progress

if TYPE_CHECKING:
    from trainers.state import TrainState


@dataclass(frozen=True)
class Directive:
    """What the loop does after a completed step; the same on all ranks."""

    save: bool = False
    stop: bool = False


class Control(Protocol):
    """Decides, after every step, whether to save or to stop."""

    def poll(self, progress: Progress) -> Directive:
        """The directive for `progress`. Collective: all ranks call it and get the same answer."""
        ...


class Checkpointer(Protocol):
    """Keeps the state."""

    def restore(self, state: TrainState) -> None:
        """Bring `state` (fresh from `build`) to the newest stable checkpoint, if there is one.

        Collective: all ranks.

        Raises:
            StateMismatchError: what was loaded is not what was saved.
        """
        ...

    def save(self, state: TrainState) -> None:
        """Take a snapshot of this rank's part of `state`, and return as soon as `state` may change again.

        Collective: all ranks, at the same step. A failure of an earlier save is raised here or by `wait`.
        """
        ...

    def wait(self) -> None:
        """Return when every snapshot taken so far is committed."""
        ...


class MetricSink(Protocol):
    """Takes the numbers of a step, and of an evaluation after it. Must not block, must not raise."""

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Called on all ranks with the same values."""
        ...

    def evaluating(self) -> None:
        """A further part of an evaluation begins. Called on all ranks, often: for whoever waits for signs of life."""
        ...

    def validated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Of the samples held out: `loss`, and `loss/ema/<profile>`; `kid/<network>` and so on, if that is measured.

        Called on all ranks with the same values."""
        ...

    def drew(self, progress: Progress, weights: str, png: bytes) -> None:
        """A grid of images, a PNG, drawn from an EMA profile or from `raw`. Called on rank 0."""
        ...

    def evaluated(self, progress: Progress, seconds: float) -> None:
        """The evaluation after this step is over, and training goes on. Called on all ranks."""
        ...


class Unsaved:
    """The `Control` and `Checkpointer` of a training that nobody keeps: it goes on to its last step."""

    def poll(self, progress: Progress) -> Directive:
        return Directive()

    def restore(self, state: TrainState) -> None:
        pass

    def save(self, state: TrainState) -> None:
        raise AssertionError("never asked to save")

    def wait(self) -> None:
        pass
