"""Steps that are replayed after a restart must give the bits that they gave before.

If they do not, memory or a processor is faulty, or something in the training is not deterministic; neither is to be
found out by the final weights.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NUMBERS = ("loss", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A replayed step that gave other numbers."""

    step: int
    ranks: tuple[int, ...]
    """Whose microbatches differ, as they are spread now; empty: the losses are the same, or the old ones unknown."""
    message: str


@dataclass(frozen=True)
class _Step:
    numbers: bytes
    losses: bytes
    """Of each microbatch, float32; empty if unknown."""


class ReplayCheck:
    """Remembers the numbers of steps, as bits, and compares when a step comes again."""

    def __init__(self, num_steps: int = 10_000) -> None:
        """Args: num_steps: how many steps are remembered."""
        self._num_steps = num_steps
        self._steps: dict[int, _Step] = {}
        self._found = False
        self._changed_from: int | None = None

    def begin_attempt(self, unknown_from: int | None) -> None:
        """Steps may be made again now.

        Args:
            unknown_from: from this step on other numbers are to be expected than before; None: the same ones.
        """
        if unknown_from is not None:
            self._steps = {at: known for at, known in self._steps.items() if at < unknown_from}
            self._changed_from = min(unknown_from, self._changed_from or unknown_from)
        self._found = False

    def learn(self, recorded: Mapping[int, Mapping[str, float]]) -> Difference | None:
        """Take over the metrics of steps that were made before this life, and compare those made again already."""
        first = None
        for step in sorted(recorded):
            if self._changed_from is not None and step >= self._changed_from:
                break
            then = _pack(recorded[step], ())
            now = self._steps.setdefault(step, then)
            if now.numbers != then.numbers and not self._found:
                self._found, first = True, _describe(step, then, now, ())
        return first

    def check(
        self, step: int, metrics: Mapping[str, float], losses: Sequence[float], ranks: Sequence[int]
    ) -> Difference | None:
        """Compare with what is remembered of `step`, if anything is, and remember this.

        Args:
            losses: of every microbatch, by index; may be empty.
            ranks: where each of them ran.

        Returns:
            The first difference of the attempt; all that follows from it is no news.
        """
        before, now = self._steps.pop(step, None), _pack(metrics, losses)
        self._steps[step] = now
        if len(self._steps) > self._num_steps:
            del self._steps[next(iter(self._steps))]
        same = before is None or (before.numbers == now.numbers and (not before.losses or before.losses == now.losses))
        if before is None or same or self._found:
            return None
        self._found = True
        return _describe(step, before, now, ranks)


def _describe(step: int, before: _Step, now: _Step, ranks_by_microbatch: Sequence[int]) -> Difference:
    microbatches = []
    if len(before.losses) == len(now.losses):
        pairs = zip(_unpack(before.losses, "f"), _unpack(now.losses, "f"), strict=True)
        microbatches = [index for index, (old, new) in enumerate(pairs) if old != new]
    ranks = tuple(sorted({ranks_by_microbatch[index] for index in microbatches}))
    then, again = _unpack(before.numbers, "d"), _unpack(now.numbers, "d")
    shown = ", ".join(
        f"{name} {struct.unpack('<d', old)[0]!r} then and {struct.unpack('<d', new)[0]!r} now"
        for name, old, new in zip(_NUMBERS, then, again, strict=True)
        if old != new
    )
    where = (
        f"first in microbatches {', '.join(map(str, microbatches))} of rank {', '.join(map(str, ranks))}"
        if microbatches
        else "the losses of its microbatches are the same"
        if now.losses and before.losses
        else "of which microbatch is not known"
    )
    message = (
        f"step {step} was replayed and gave other numbers: {shown or 'the same loss and norm'}; {where}."
        " Memory or a processor is faulty, or the training is not deterministic"
    )
    return Difference(step=step, ranks=ranks, message=message)


def _pack(metrics: Mapping[str, float], losses: Sequence[float]) -> _Step:
    # A step that is skipped has no numbers; it stands as NaN.
    numbers = struct.pack("<2d", *(metrics.get(name, float("nan")) for name in _NUMBERS))
    return _Step(numbers, struct.pack(f"<{len(losses)}f", *losses))


def _unpack(data: bytes, kind: str) -> list[bytes]:
    size = struct.calcsize(kind)
    return [data[at : at + size] for at in range(0, len(data), size)]
