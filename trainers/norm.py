"""The gradient norm and the loss of a step, and distances of weights, the same bits for every world size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from trainers.parallel import LocalParameter
from trainers.reduction import Topology
from trainers.tree import halve

_BLOCK_NUMEL = 1 << 18
"""Rows are squared and folded in blocks of about this many elements: 1 MiB of temporaries, cache-sized on CPU."""


_RowsOf = Callable[[LocalParameter], torch.Tensor | None]


class StepSums:
    """Sums one step's squared gradients and losses over all ranks, in one small all-reduce.

    Each row of a gradient (dimension 0, which sharding never cuts) is summed where it lies, by one of its replicas; the
    row sums, and the losses of the microbatches, are put into one vector in which every rank fills only its own places,
    so that adding the ranks' vectors is exact; then everybody folds the same vector.
    """

    def __init__(self, parameters: Sequence[LocalParameter], topology: Topology, device: torch.device) -> None:
        self._parameters = parameters
        self._device = device
        self._num_rows = sum(parameter.shape[0] for parameter in parameters)
        by_width: dict[int, list[tuple[LocalParameter, int]]] = defaultdict(list)
        first = 0
        for parameter in parameters:
            if parameter.local.numel():
                width = parameter.local.numel() // len(parameter.local)
                by_width[width].append((parameter, first + parameter.row_offset))
            first += parameter.shape[0]
        self._blocks = [block for width, group in by_width.items() for block in _blocks(width, group, topology)]

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
        for width, members in self._blocks:
            self._sum_rows(width, members, sums, rows_of, minus)

    def _sum_rows(
        self,
        width: int,
        members: list[tuple[LocalParameter, int, slice]],
        sums: torch.Tensor,
        rows_of: _RowsOf,
        minus: Mapping[str, torch.Tensor] | None,
    ) -> None:
        squares = torch.empty(sum(part.stop - part.start for _, _, part in members), width, device=self._device)
        taken, places = 0, []
        for parameter, first, part in members:
            tensor = rows_of(parameter)
            if tensor is None:
                continue
            rows = tensor.reshape(-1, width)[part]
            if minus is not None:
                rows = rows - minus[parameter.name].reshape(-1, width)[part]
            torch.mul(rows, rows, out=squares[taken : taken + len(rows)])
            places.append((first, taken, len(rows)))
            taken += len(rows)
        found = halve(squares[:taken])
        for first, place, count in places:
            sums[first : first + count] = found[place : place + count]


def _blocks(
    width: int, group: list[tuple[LocalParameter, int]], topology: Topology
) -> list[tuple[int, list[tuple[LocalParameter, int, slice]]]]:
    """Cut the rows of equally wide parameters into blocks, so that few operations serve many small tensors.

    Of the rows that several replicas hold only those that are this one's to sum.
    """
    rows_per_block = max(1, _BLOCK_NUMEL // width)
    blocks: list[list[tuple[LocalParameter, int, slice]]] = [[]]
    room = rows_per_block
    for parameter, first in group:
        start, stop = (
            len(parameter.local) * of // topology.num_replicas for of in (topology.replica, topology.replica + 1)
        )
        while start < stop:
            if room == 0:
                blocks.append([])
                room = rows_per_block
            take = min(room, stop - start)
            blocks[-1].append((parameter, first + start, slice(start, start + take)))
            start, room = start + take, room - take
    return [(width, block) for block in blocks]


def clip_(parameters: Sequence[LocalParameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale the local gradients so that the global norm is at most `max_norm`, as `torch.nn.utils` does. Local."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    grads = [grad for parameter in parameters if (grad := parameter.local_grad()) is not None and grad.numel()]
    if grads and scale.item() < 1:
        torch._foreach_mul_(grads, scale)
