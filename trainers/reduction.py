"""Sums over microbatches in one fixed binary tree, bitwise the same for every world size and strategy.

Leaf m of the tree is the gradient of microbatch m, already divided by the number of microbatches M. Adjacent nodes of
equal height are added pairwise; what is left over at the end is folded from the right. Rank r works on the microbatches
r, r + W, r + 2W, ... so leaves arrive in order at every world size W, and the same additions are made everywhere.

W = R * S ranks form R replicas of S shards (ddp: S = 1, fsdp: R = 1). In each round a unit of parameters goes

1. through an all-to-all inside the shard group (the bytes of a reduce-scatter): every rank gets the S leaves of its
   shard and adds those that form whole nodes of the tree;
2. through an all-to-all of these nodes among the R ranks that hold the same shard, each owning one slice of it. After
   the last round an all-gather hands the finished slices back (together the bytes of a ring all-reduce).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Private path: the base class of the public `FSDPModule.set_custom_reduce_scatter`.
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

# Renamed in torch 2.13; the old name warns there, the new one is missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TreeSum:
    """A streaming pairwise sum: a binary counter whose digits are partial sums of 2**height leaves."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, torch.Tensor]] = []

    def push(self, node: torch.Tensor, height: int = 0) -> None:
        """Append the sum of the next 2**height leaves. Takes ownership: `node` may be written to."""
        while self._stack and self._stack[-1][0] == height:
            _, left = self._stack.pop()
            node = left.add_(node)
            height += 1
        self._stack.append((height, node))

    def nodes(self) -> list[tuple[int, torch.Tensor]]:
        """The (height, sum) pairs not yet added to each other, in leaf order."""
        return self._stack

    def own_memory(self) -> None:
        """Copy what is kept for the next round, so that the receive buffers it lies in can be freed."""
        self._stack = [(height, node.clone()) for height, node in self._stack]

    def finish(self) -> torch.Tensor:
        """The sum of all leaves; the tree is empty afterwards."""
        _, total = self._stack.pop()
        while self._stack:
            _, left = self._stack.pop()
            total = left.add_(total)
        return total


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


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this rank stands among R replicas of S shards: rank = replica * S + shard."""

    num_replicas: int
    shard_size: int
    rank: int
    replicate_group: dist.ProcessGroup
    shard_group: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        return self.num_replicas * self.shard_size

    @property
    def replica(self) -> int:
        return self.rank // self.shard_size

    @property
    def shard(self) -> int:
        return self.rank % self.shard_size

    def leaves(self, replica: int, round_index: int, num_microbatches: int) -> range:
        """The microbatches that a replica works on in one round; empty where it idles."""
        first = round_index * self.world_size + replica * self.shard_size
        return range(first, max(first, min(first + self.shard_size, num_microbatches)))


@dataclass
class Rounds:
    """Which round of a step is running. Shared by the loop, which moves it, and by every unit's reduction."""

    num_microbatches: int
    world_size: int
    current: int = 0

    @property
    def count(self) -> int:
        return -(-self.num_microbatches // self.world_size)

    @property
    def is_last(self) -> bool:
        return self.current == self.count - 1

    def __iter__(self) -> Iterator[int]:
        for index in range(self.count):
            self.current = index
            yield index


class InvariantReduction(ReduceScatter):
    """The gradient reduction of one FSDP unit. Collective: all ranks, in the same order of units."""

    def __init__(self, topology: Topology, rounds: Rounds) -> None:
        self._topology = topology
        self._rounds = rounds
        self._tree = TreeSum()
        self._leaves: Sequence[torch.Tensor] = ()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """In place of the reduce-scatter: hand every rank all leaves of its shard. `finish_round` adds them."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        self._leaves = received.view(self._topology.shard_size, -1).unbind(0)

    def finish_round(self, output: torch.Tensor) -> None:
        """FSDP's all-reduce hook: runs after the reduce-scatter, or instead of it where S = 1.

        FSDP adds up what `output` holds after each round, so it is zero until the last.
        """
        if self._topology.shard_size == 1:
            self._leaves = (output.clone(),)  # not a view: the output is overwritten below
        elif output.is_cuda:
            # The leaves were allocated on the reduce-scatter stream and are read on this one.
            self._leaves[0].record_stream(torch.cuda.current_stream())
        live = self._topology.leaves(self._topology.replica, self._rounds.current, self._rounds.num_microbatches)
        leaves = self._leaves[: len(live)]
        self._leaves = ()
        if self._topology.num_replicas == 1:
            for leaf in leaves:
                self._tree.push(leaf)
            total = self._tree.finish() if self._rounds.is_last else None
        else:
            total = self._exchange_nodes(self._local_nodes(live, leaves), output)
        if total is None:
            self._tree.own_memory()
            output.zero_()
        else:
            torch.add(total, 0.0, out=output)  # -0.0 becomes 0.0, as it does where FSDP adds rounds up

    def _local_nodes(self, live: range, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        nodes = []
        taken = 0
        for height in aligned_heights(live.start, live.stop):
            tree = TreeSum()
            for leaf in leaves[taken : taken + (1 << height)]:
                tree.push(leaf)
            nodes.append(tree.finish())
            taken += 1 << height
        return nodes

    def _exchange_nodes(self, nodes: list[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        """Add every replica's nodes on the owners of the slices; after the last round return the whole shard's sum."""
        topology, rounds = self._topology, self._rounds
        replicas, numel = topology.num_replicas, output.numel()
        slice_numel = -(-numel // replicas)
        heights = []
        for replica in range(replicas):
            live = topology.leaves(replica, rounds.current, rounds.num_microbatches)
            heights.append(aligned_heights(live.start, live.stop))
        # (nodes, R, slice) -> (R, nodes, slice): one contiguous message a slice owner
        sent = output.new_zeros(len(nodes), replicas * slice_numel)
        for row, node in zip(sent, nodes, strict=True):
            row[:numel].copy_(node)
        sent = sent.view(len(nodes), replicas, slice_numel).transpose(0, 1).contiguous()
        counts = [len(h) * slice_numel for h in heights]
        received = sent.new_empty(sum(counts))
        dist.all_to_all_single(
            received, sent.view(-1), counts, [len(nodes) * slice_numel] * replicas, group=topology.replicate_group
        )
        arrived = iter(received.view(-1, slice_numel).unbind(0))
        for height in (height for replica_heights in heights for height in replica_heights):
            self._tree.push(next(arrived), height)
        if not rounds.is_last:
            return None
        total = self._tree.finish()
        gathered = total.new_empty(replicas * slice_numel)
        _all_gather(gathered, total.contiguous(), group=topology.replicate_group)
        return gathered[:numel]
