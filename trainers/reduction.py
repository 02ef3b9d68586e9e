"""Sums over microbatches in one fixed binary tree, bitwise the same for every world size and strategy.

Leaf m of the tree is the gradient of microbatch m, already divided by the number of microbatches M. Adjacent nodes of
equal height are added pairwise, where the left one begins at a multiple of twice their leaves; what is left over at
the end is folded from the right. So which additions are made depends on M alone, and not on who makes them.

W = R * S ranks form R replicas of S shards (ddp: S = 1, fsdp: R = 1). In every exchange a unit of parameters goes

1. through an all-to-all inside the shard group (the bytes of a reduce-scatter): every rank gets its shard of the nodes
   that each member has, and adds those that form greater nodes;
2. through an all-to-all of these nodes among the R ranks that hold the same shard, each owning one slice of it. After
   the last exchange an all-gather hands the finished slices back (together the bytes of a ring all-reduce).

A rank works on several microbatches of a step where M > W, in as many rounds. Either they are neighbours, are added
before they are exchanged, and there is one exchange a step (`accumulation: local`); or there is an exchange in every
round, of one microbatch a rank, in order (`sharded`).
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

    @property
    def replicas(self) -> list[range]:
        """The ranks of every replica."""
        return [range(first, first + self.shard_size) for first in range(0, self.world_size, self.shard_size)]

    @property
    def shard_peers(self) -> list[range]:
        """The ranks of this rank's replica, one by one."""
        return [range(rank, rank + 1) for rank in self.replicas[self.replica]]


@dataclass
class Rounds:
    """Which round of a step is running. Shared by the loop, which moves it, and by every unit's reduction."""

    num_microbatches: int
    world_size: int
    local: bool
    """Every rank has neighbouring microbatches, and one exchange ends the step; else one exchange a round."""
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

    def microbatch(self, rank: int) -> int | None:
        """What a rank works on in this round; None: it idles."""
        index = rank * self.count + self.current if self.local else self.current * self.world_size + rank
        return index if index < self.num_microbatches else None

    def rank_of(self, microbatch: int) -> int:
        """Who works on a microbatch."""
        return microbatch // self.count if self.local else microbatch % self.world_size

    def leaves(self, ranks: range) -> range:
        """The microbatches that these ranks bring to this round's exchange."""
        if self.local:
            first, stop = ranks.start * self.count, ranks.stop * self.count
        else:
            first, stop = (self.current * self.world_size + rank for rank in (ranks.start, ranks.stop))
        return range(min(first, self.num_microbatches), min(stop, self.num_microbatches))


class InvariantReduction(ReduceScatter):
    """The gradient reduction of one FSDP unit. Collective: all ranks, in the same order of units."""

    def __init__(self, topology: Topology, rounds: Rounds) -> None:
        self._topology = topology
        self._rounds = rounds
        self._tree = TreeSum()
        """Of this rank's slice of its shard, over all microbatches."""
        self._own: TreeSum | None = None
        """Of the whole unit, over this rank's own microbatches since the last exchange."""
        self._arrived: list[torch.Tensor] = []
        """This rank's shard of the nodes that its shard group brought to this exchange."""

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
        """In place of the reduce-scatter: hand every rank its shard of all nodes. `finish_round` adds them."""
        self._add_own(input_tensor)
        if self._exchanges:
            self._arrived = self._exchange(self._take_own(), input_tensor, self._topology.shard_peers, group)

    def finish_round(self, output: torch.Tensor) -> None:
        """FSDP's all-reduce hook: runs after the reduce-scatter, or instead of it where S = 1.

        FSDP adds up what `output` holds after each round, so it is zero until the last.
        """
        if self._topology.shard_size == 1:
            self._add_own(output.clone())  # not a view: the output is overwritten below
            self._arrived = self._take_own() if self._exchanges else []
        elif output.is_cuda and self._arrived:
            # They were allocated on the reduce-scatter stream and are read on this one.
            self._arrived[0].record_stream(torch.cuda.current_stream())
        if self._exchanges:
            self._add_arrived(output)
        if not self._rounds.is_last:
            self._tree.own_memory()
            output.zero_()
        else:
            torch.add(self._total(output), 0.0, out=output)  # -0.0 becomes 0.0, as it does where FSDP adds rounds up

    @property
    def _exchanges(self) -> bool:
        return self._rounds.is_last or not self._rounds.local

    def _add_own(self, leaf: torch.Tensor) -> None:
        index = self._rounds.microbatch(self._topology.rank)
        if index is None:
            return
        if self._own is None:
            self._own = TreeSum(index)
        self._own.push(leaf)

    def _take_own(self) -> list[torch.Tensor]:
        own, self._own = self._own, None
        return own.nodes() if own else []

    def _add_arrived(self, output: torch.Tensor) -> None:
        """Push this exchange's nodes into the tree; with replicas, after they have exchanged slices of them."""
        topology = self._topology
        nodes, heights = self._arrived, self._heights(topology.shard_peers)
        self._arrived = []
        if topology.num_replicas > 1:
            of_replica = TreeSum(self._rounds.leaves(topology.replicas[topology.replica]).start)
            for height, node in zip(heights, nodes, strict=True):
                of_replica.push(node, height)
            nodes = self._exchange(of_replica.nodes(), output, topology.replicas, topology.replicate_group)
            heights = self._heights(topology.replicas)
        for height, node in zip(heights, nodes, strict=True):
            self._tree.push(node, height)

    def _heights(self, members: Sequence[range]) -> list[int]:
        """Of the nodes that these ranges of ranks bring to this exchange, in leaf order."""
        spans = (self._rounds.leaves(ranks) for ranks in members)
        return [height for span in spans for height in aligned_heights(span.start, span.stop)]

    def _exchange(
        self, nodes: list[torch.Tensor], like: torch.Tensor, members: Sequence[range], group: dist.ProcessGroup
    ) -> list[torch.Tensor]:
        """Cut `nodes`, (like.numel(),) each, into one part a member of the group, and hand every member its parts.

        Returns:
            This rank's part of all members' nodes, in leaf order.
        """
        numel, num_members = like.numel(), len(members)
        part = -(-numel // num_members)
        if len(nodes) == 1 and part * num_members == numel:
            sent = nodes[0]
        else:
            padded = like.new_zeros(len(nodes), part * num_members)
            for row, node in zip(padded, nodes, strict=True):
                row[:numel].copy_(node)
            # (nodes, members, part) -> (members, nodes, part): one contiguous message a member
            sent = padded.view(len(nodes), num_members, part).transpose(0, 1).contiguous()
        counts = [len(self._heights([ranks])) * part for ranks in members]
        received = like.new_empty(sum(counts))
        dist.all_to_all_single(received, sent.view(-1), counts, [len(nodes) * part] * num_members, group=group)
        return list(received.view(-1, part).unbind(0))

    def _total(self, output: torch.Tensor) -> torch.Tensor:
        """The finished sum of the whole shard."""
        topology, total = self._topology, self._tree.finish()
        if topology.num_replicas == 1:
            return total
        gathered = total.new_empty(topology.num_replicas * total.numel())
        _all_gather(gathered, total.contiguous(), group=topology.replicate_group)
        return gathered[: output.numel()]
