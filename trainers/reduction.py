"""Gradients summed over microbatches in the tree of `trainers.tree`, the same for every world size and strategy.

Leaf m of the tree is the gradient of microbatch m, already divided by the number of microbatches M.

W = R * S ranks form R replicas of S shards (ddp: S = 1, fsdp: R = 1). In every exchange a unit of parameters goes

1. through an all-to-all inside the shard group (the bytes of a reduce-scatter): every rank gets its shard of the nodes
   that each member has, and adds those that form greater nodes;
2. through an all-to-all of these nodes among the R ranks that hold the same shard, each owning one slice of it. After
   the last exchange an all-gather hands the finished slices back (together the bytes of a ring all-reduce).

A rank works on several microbatches of a step where M > W, in as many rounds. Either they are neighbours, are added
before they are exchanged, and there is one exchange a step (`accumulation: local`); or there is an exchange in every
round, of one microbatch a rank, in order (`sharded`).

Exchanges go on while the backward pass does: see `trainers.exchanges`; on a GPU FSDP's streams see to it. What a
gradient holds counts after the last round only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

# Private path: the base class of the public `FSDPModule.set_custom_reduce_scatter`.
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from trainers.exchanges import Exchanges, Reduction
from trainers.integrity import digest
from trainers.slices import Exchange, exchange, hand_back
from trainers.steadiness import Steady
from trainers.tree import TreeSum, add_up, aligned_heights


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
    exchanges: Exchanges = field(default_factory=Exchanges)
    """Those of the round that is running."""
    shift: int | None = None
    """A rehearsal: each rank works on what the one so far after it will, and nothing is exchanged. None: in earnest."""
    bits: torch.Tensor | None = None
    """Where the bits of each microbatch's gradient are added up, (M,) int64, if somebody compares them."""
    after_backward: list[Callable[[], None]] = field(default_factory=list)
    """Called in order at the end of every round."""

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
            for begin in self.after_backward:
                begin()
            self.exchanges.finish()

    def microbatch(self, rank: int) -> int | None:
        """What a rank works on in this round; None: it idles."""
        rank = (rank + (self.shift or 0)) % self.world_size
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
        self._begun: Exchange | None = None
        """Inside the shard group, of this round."""
        self._whole: torch.Tensor | None = None
        """Without shards: memory for the next gradient."""
        self._given: torch.Tensor | None = None
        """What FSDP has got of it, and will ask for once more."""
        self._steady = Steady[object]()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for the whole gradient, and then for this rank's shard of it.

        Without shards it is one and the same, as FSDP would only copy one to the other.
        """
        if self._topology.shard_size > 1:
            return torch.empty(*size, dtype=dtype, device=device)
        if self._given is None:
            self._given = self.room(int(size[0]), torch.empty(0, dtype=dtype, device=device))
            return self._given
        given, self._given = self._given, None
        return given

    def room(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Without shards: memory for a gradient; on a CPU, where new memory costs more than what is done with it, that
        of the step before."""
        self._steady.check(numel)
        whole, self._whole = self._whole, None
        return whole if whole is not None and len(whole) == numel else like.new_empty(numel)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """In place of the reduce-scatter: hand every rank its shard of all nodes. `finish_round` adds them."""
        self._steady.check(input_tensor.numel())
        self._add_own(input_tensor)
        if self._exchanges:
            counts = [len(self._heights([ranks])) for ranks in self._topology.shard_peers]
            self._begun = exchange(self._take_own(), counts, input_tensor, group)

    def finish_round(self, output: torch.Tensor) -> None:
        """FSDP's all-reduce hook: runs after the reduce-scatter, or instead of it where S = 1.

        What `output` holds after a round but the last is of no use: `begin_round` throws it away.
        """
        if self._topology.shard_size == 1:
            self._add_own(output)  # not copied: it is written to when nobody needs the leaf any more
        elif output.is_cuda and self._begun is not None:
            # It was allocated on the reduce-scatter stream and is read on this one.
            self._begun.received.record_stream(torch.cuda.current_stream())
        if self._exchanges:
            self._rounds.exchanges.begin(self._reduce(output))

    @property
    def _exchanges(self) -> bool:
        return self._rounds.shift is None and (self._rounds.is_last or not self._rounds.local)

    def _add_own(self, leaf: torch.Tensor) -> None:
        index = self._rounds.microbatch(self._topology.rank)
        if index is not None and self._rounds.bits is not None:
            self._rounds.bits[index] += digest([leaf])
        if index is None or self._rounds.shift is not None:
            return
        if self._own is None:
            self._own = TreeSum(index)
        if leaf.is_cuda:
            # It was allocated on the stream of the backward pass, and FSDP keeps it only until its own event. Without
            # this the next activations may be written over a sum that this stream has yet to send.
            leaf.record_stream(torch.cuda.current_stream())
        self._own.push(leaf)

    def _take_own(self) -> list[torch.Tensor]:
        own, self._own = self._own, None
        return own.nodes() if own else []

    def _reduce(self, output: torch.Tensor) -> Reduction:
        """Push this exchange's nodes into the tree; with replicas, after they have exchanged slices of them."""
        topology = self._topology
        heights = self._heights(topology.shard_peers)
        if topology.shard_size == 1:
            nodes = self._take_own()
        else:
            begun, self._begun = self._begun, None
            assert begun is not None
            yield begun.works
            nodes = begun.parts
        if topology.num_replicas > 1:
            of_replica = TreeSum(self._rounds.leaves(topology.replicas[topology.replica]).start)
            for height, node in zip(heights, nodes, strict=True):
                of_replica.push(node, height)
            counts = [len(self._heights([ranks])) for ranks in topology.replicas]
            begun = exchange(of_replica.nodes(), counts, output, topology.replicate_group)
            yield begun.works
            nodes, heights = begun.parts, self._heights(topology.replicas)
        if self._rounds.is_last:
            nodes, heights = [*self._tree.nodes(), *nodes], [*self._tree.heights(), *heights]
            self._tree = TreeSum()
            if topology.num_replicas == 1:
                add_up(nodes, heights, output)
            else:
                yield from hand_back(nodes, heights, output, topology.replicate_group)
            if topology.shard_size == 1 and not output.is_cuda:
                self._whole = output  # these gradients are of no use any more when the next ones are made
        else:
            for height, node in zip(heights, nodes, strict=True):
                self._tree.push(node, height)
            self._tree.own_memory()

    def _heights(self, members: Sequence[range]) -> list[int]:
        """Of the nodes that these ranges of ranks bring to this exchange, in leaf order."""
        spans = (self._rounds.leaves(ranks) for ranks in members)
        return [height for span in spans for height in aligned_heights(span.start, span.stop)]
