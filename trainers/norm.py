"""The gradient norm and the loss of a step, and distances of weights, the same bits for every world size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainers.parallel import LocalParameter
from trainers.reduction import Topology
from trainers.tree import halve

_BLOCK_NUMEL = 1 << 18
"""Rows are squared and folded in blocks of about this many elements: 1 MiB, cache-sized on CPU."""
_NARROW = 64
"""What rows are folded to block by block; the rest is done for many blocks at once."""

_RowsOf = Callable[[LocalParameter], torch.Tensor | None]
_Fold = tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Rows:
    """Some rows of a parameter, and where their sums begin."""

    parameter: LocalParameter
    part: slice
    first: int

    def __len__(self) -> int:
        return self.part.stop - self.part.start


class StepSums:
    """Sums one step's squared gradients and losses over all ranks, in one small all-reduce.

    Each row of a gradient (dimension 0, which sharding never cuts) is summed where it lies, by one of its replicas; the
    row sums, and the losses of the microbatches, are put into one vector in which every rank fills only its own places,
    so that adding the ranks' vectors is exact; then everybody folds the same vector.
    """

    def __init__(self, parameters: Sequence[LocalParameter], topology: Topology, device: torch.device) -> None:
        self._device = device
        self._num_rows = sum(parameter.shape[0] for parameter in parameters)
        by_width: dict[int, list[_Rows]] = defaultdict(list)
        first = 0
        for parameter in parameters:
            if parameter.local.numel():
                held = len(parameter.local)
                # Of the rows that several replicas hold only some are this one's to sum.
                start, stop = (held * of // topology.num_replicas for of in (topology.replica, topology.replica + 1))
                rows = _Rows(parameter, slice(start, stop), first + parameter.row_offset + start)
                by_width[parameter.local.numel() // held].append(rows)
            first += parameter.shape[0]
        room = torch.empty(2, max([_BLOCK_NUMEL, *by_width]), device=device)
        self._groups = [
            _Group(width, some, room)
            for width, rows in by_width.items()
            for some in _cut(rows, _BLOCK_NUMEL // min(width, _NARROW))
        ]

    def __call__(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mean loss, the L2 norm of the gradient, and every rank's losses. Collective: all ranks.

        Args:
            losses: (M,) float32, zero but for the microbatches of this rank.

        Returns:
            loss, norm: 0-dimensional float32 tensors on the device; losses: (M,) of all microbatches. The same bits on
            all ranks.
        """
        sums = torch.zeros(self._num_rows + len(losses), device=self._device)
        sums[self._num_rows :] = losses
        self._add_squares(sums, LocalParameter.local_grad)
        dist.all_reduce(sums)
        losses = sums[self._num_rows :]
        return halve(losses) / len(losses), halve(sums[: self._num_rows]).sqrt(), losses

    def distances(self, averages: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, float]:
        """How far averages are from the weights: |average - weights| / |weights| in L2. Collective: all ranks.

        Args:
            averages: profile -> parameter name -> local rows.
        """
        sums = torch.zeros(1 + len(averages), self._num_rows, device=self._device)
        self._add_squares(sums[0], lambda parameter: parameter.local)
        for out, average in zip(sums[1:], averages.values(), strict=True):
            self._add_squares(out, lambda parameter: parameter.local, minus=average)
        dist.all_reduce(sums)
        weights, *parts = halve(sums).sqrt().tolist()
        return {name: part / weights for name, part in zip(averages, parts, strict=True)}

    def _add_squares(self, sums: torch.Tensor, rows_of: _RowsOf, minus: Mapping[str, torch.Tensor] | None = None):
        """Put the sum of squares of every row into its place in `sums`; of the difference from `minus`, if given."""
        for group in self._groups:
            group.add_squares(sums, rows_of, minus)


class _Group:
    """Equally wide rows. Blocks of them are squared and folded in place; what that leaves of all is folded at once."""

    def __init__(self, width: int, rows: list[_Rows], room: torch.Tensor) -> None:
        """
        Args:
            room: (2, N), for the squares of one block and for what all are folded to; shared by all groups.
        """
        self._width = width
        self._rows = rows
        num_rows, narrow = sum(map(len, rows)), _folded(width)
        self._rest = room[1, : num_rows * narrow].view(num_rows, narrow)
        self._blocks = []
        """Rows, where their squares go, and what is to be done with these."""
        taken = 0
        for block in _cut(rows, max(1, _BLOCK_NUMEL // width)):
            count = sum(map(len, block))
            squares = room[0, : count * width].view(count, width)
            self._blocks.append((block, squares, _folds(squares, self._rest[taken : taken + count])))
            taken += count

    def add_squares(self, sums: torch.Tensor, rows_of: _RowsOf, minus: Mapping[str, torch.Tensor] | None) -> None:
        """See `StepSums`."""
        for block, squares, folds in self._blocks:
            taken = 0
            for some in block:
                self._square(some, squares[taken : taken + len(some)], rows_of, minus)
                taken += len(some)
            for step, source in folds:
                step(source)
        found, taken = halve(self._rest), 0
        for some in self._rows:
            sums[some.first : some.first + len(some)] = found[taken : taken + len(some)]
            taken += len(some)

    def _square(
        self, some: _Rows, out: torch.Tensor, rows_of: _RowsOf, minus: Mapping[str, torch.Tensor] | None
    ) -> None:
        tensor = rows_of(some.parameter)
        if tensor is None:
            out.zero_()
            return
        rows = tensor.reshape(-1, self._width)[some.part]
        if minus is not None:
            rows = rows - minus[some.parameter.name].reshape(-1, self._width)[some.part]
        torch.mul(rows, rows, out=out)


def _cut(rows: list[_Rows], size: int) -> list[list[_Rows]]:
    """Cut into lists of `size` rows, so that few operations serve many small tensors."""
    lists: list[list[_Rows]] = []
    room = 0
    for some in rows:
        start = some.part.start
        while start < some.part.stop:
            if room == 0:
                lists.append([])
                room = size
            take = min(room, some.part.stop - start)
            lists[-1].append(_Rows(some.parameter, slice(start, start + take), some.first + start - some.part.start))
            start, room = start + take, room - take
    return lists


def _folded(width: int) -> int:
    """What rows are folded to in their block."""
    while width > _NARROW:
        width -= width // 2
    return width


def _folds(squares: torch.Tensor, out: torch.Tensor) -> list[_Fold]:
    """The first additions of `halve`, in place, until rows are as narrow as `out`, which they are then copied to."""
    folds: list[_Fold] = []
    width = squares.shape[1]
    while width > out.shape[1]:
        half = width // 2
        folds.append((squares[:, :half].add_, squares[:, half : 2 * half]))
        if width % 2:  # the last one moves up
            folds.append((squares[:, half : half + 1].copy_, squares[:, width - 1 : width]))
        width -= half
    return [*folds, (out.copy_, squares[:, :width])]


def clip_(parameters: Sequence[LocalParameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale the local gradients so that the global norm is at most `max_norm`, as `torch.nn.utils` does. Local."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    grads = [grad for parameter in parameters if (grad := parameter.local_grad()) is not None and grad.numel()]
    if grads and scale.item() < 1:
        torch._foreach_mul_(grads, scale)
