"""Where a rank is in its step, written down before every microbatch where others can read it.

The memory may be shared with a process that outlives this one: so it is known which samples a trainer worked on that
left no last word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_HEAD = 6  # stage, step, microbatch, position, blame, number of samples


class Stage(IntEnum):
    """What a rank does with a microbatch."""

    BETWEEN = 0
    DATA = 1
    MODEL = 2


class Blame(IntEnum):
    """What a failure here says about the samples."""

    NONE = 0
    """Nothing: all of them can not be read, or none alone; rather their storage."""
    MICROBATCH = 1
    """It may be any of them."""
    EXACT = 2
    """These can not be read, others of the microbatch can."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One microbatch at work."""

    step: int
    """The step that was being made, counted from 1."""
    microbatch: int
    position: int
    """Global position of the microbatch's first sample."""
    stage: Stage
    blame: Blame
    samples: tuple[int, ...]
    """Dataset indices: those to blame if that is known, else all of the microbatch."""


class StepTrace:
    """One rank's trace. Costs a microsecond a microbatch."""

    def __init__(self, microbatch_size: int, memory: memoryview | None = None) -> None:
        """Args: memory: `num_bytes(microbatch_size)` writable bytes; None: nobody else reads it."""
        self._memory = memory or memoryview(bytearray(num_bytes(microbatch_size)))
        self._cells = np.frombuffer(self._memory, np.int64)
        self.losses: tuple[float, ...] = ()
        """The loss of every microbatch of the last step, whichever rank it ran on; empty after a step not trained."""
        self.ranks: tuple[int, ...] = ()
        """Which rank each microbatch runs on, the same in every step."""
        self.broken: tuple[str, ...] = ()
        """Samples of the last step, of any rank, that could not be read, and why; others took their places."""

    def enter(self, step: int, microbatch: int, position: int) -> None:
        """A microbatch begins: its data is about to be read."""
        self._cells[0] = Stage.BETWEEN  # a reader must not see half of an entry
        self._cells[1:_HEAD] = (step, microbatch, position, Blame.MICROBATCH, 0)
        self._cells[0] = Stage.DATA

    def reading(self, samples: Iterable[int], blame: Blame = Blame.MICROBATCH) -> None:
        """These dataset indices are read, or are what could not be read."""
        indices = list(samples)
        self._cells[5] = 0
        self._cells[_HEAD : _HEAD + len(indices)] = indices
        self._cells[4] = blame
        self._cells[5] = len(indices)

    def computing(self) -> None:
        """The data is there, the model runs."""
        self._cells[0] = Stage.MODEL

    def leave(self, losses: Iterable[float]) -> None:
        """No microbatch is at work. `losses` are those of the whole step."""
        self._cells[0] = Stage.BETWEEN
        self.losses = tuple(losses)

    def place(self) -> Place | None:
        """The microbatch at work; None: none is."""
        return read_place(self._memory)


def num_bytes(microbatch_size: int) -> int:
    """Size of the memory of a trace."""
    return 8 * (_HEAD + microbatch_size)


def read_place(memory: memoryview) -> Place | None:
    """What the trace in `memory` says; None: no microbatch was at work."""
    cells = np.frombuffer(memory, np.int64)
    stage, step, microbatch, position, blame, count = cells[:_HEAD].tolist()
    if stage == Stage.BETWEEN:
        return None
    return Place(
        step=step,
        microbatch=microbatch,
        position=position,
        stage=Stage(stage),
        blame=Blame(blame),
        samples=tuple(cells[_HEAD : _HEAD + count].tolist()),
    )
