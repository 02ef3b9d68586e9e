"""Sums in one fixed binary tree.

Adjacent nodes of equal height are added pairwise, where the left one begins at a multiple of twice their leaves; what
is left over at the end is folded from the right. So which additions are made depends on the number of leaves alone, and
not on who makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BLOCK_NUMEL = 1 << 16
"""256 KiB: a few of them fit into a core's cache."""


class TreeSum:
    """A streaming pairwise sum over leaves `start`, `start` + 1, ...: a binary counter with partial sums for digits."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._stop = start
        self._stack: list[tuple[int, torch.Tensor]] = []

    def push(self, node: torch.Tensor, height: int = 0) -> None:
        """Append the sum of the next 2**height leaves. Takes ownership: `node` may be written to."""
        first = self._stop
        self._stop += 1 << height
        while self._stack and self._stack[-1][0] == height and not (first - (1 << height)) % (2 << height):
            _, left = self._stack.pop()
            node = left.add_(node)
            first -= 1 << height
            height += 1
        self._stack.append((height, node))

    def nodes(self) -> list[torch.Tensor]:
        """The sums not yet added to each other, in leaf order: the nodes of `aligned_heights(start, stop)`."""
        return [node for _, node in self._stack]

    def heights(self) -> list[int]:
        """Those of `nodes`."""
        return [height for height, _ in self._stack]

    def own_memory(self) -> None:
        """Copy what is kept for the next exchange, so that the receive buffers it lies in can be freed."""
        self._stack = [(height, node.clone()) for height, node in self._stack]

    def finish(self) -> torch.Tensor:
        """The sum of all leaves; the tree is empty afterwards."""
        _, total = self._stack.pop()
        while self._stack:
            _, left = self._stack.pop()
            total = left.add_(total)
        self._stop = self._start
        return total


def add_up(nodes: Sequence[torch.Tensor], heights: Sequence[int], out: torch.Tensor) -> None:
    """Sum as many elements of `nodes` as `out` has into `out`. They are written to; `out` may be the first of them.

    On a CPU block by block, so that what one addition leaves is in the cache when the next one needs it.
    """
    block = out.numel() if out.is_cuda else _BLOCK_NUMEL
    for first in range(0, out.numel(), max(1, block)):
        tree, place = TreeSum(), slice(first, min(first + block, out.numel()))
        for height, node in zip(heights, nodes, strict=True):
            tree.push(node[place], height)
        torch.add(tree.finish(), 0.0, out=out[place])  # -0.0 becomes 0.0


def aligned_heights(start: int, stop: int) -> list[int]:
    """Heights of the largest whole tree nodes that make up the leaves `start : stop`, in order."""
    heights = []
    while start < stop:
        height = (start & -start).bit_length() - 1 if start else (stop - start).bit_length() - 1
        while start + (1 << height) > stop:
            height -= 1
        heights.append(height)
        start += 1 << height
    return heights


def halve(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension by folding it in half: elementwise additions only.

    The order depends on the length alone, so the result does not depend on how rows are sharded or batched, nor on a
    device's choice of reduction kernel.

    Shapes: (..., N) -> (...,); N = 0 gives 0.
    """
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    while (n := values.shape[-1]) > 1:
        half = n // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat((folded, values[..., -1:]), dim=-1) if n % 2 else folded
    return values[..., 0]
