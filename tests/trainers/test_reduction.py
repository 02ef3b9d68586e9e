from __future__ import annotations

import itertools
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from tests.trainers.test_tree import tree_by_definition
from trainers import slices
from trainers.reduction import InvariantReduction, Rounds, Topology

LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)]
"""Number of ranks, and of replicas."""
NUMS_MICROBATCHES = (6, 7, 11)
NUMEL = 101
FEW = 3
"""Elements of which one of four replicas owns none."""

Case = tuple[int, int, bool, bool]
"""Number of microbatches, number of elements, local accumulation, messages instead of collectives."""
CASES: list[Case] = [
    *itertools.product(NUMS_MICROBATCHES, (NUMEL,), (True, False), (True,)),
    *itertools.product((7,), (FEW, NUMEL), (True, False), (False,)),
    *itertools.product((7,), (FEW,), (True, False), (True,)),
]


@cache
def reduced(world_size: int) -> list[dict[tuple[int, Case], torch.Tensor]]:
    """Every case of this world size, by rank; in one group of processes, as starting those takes longest."""
    return run_ranks(world_size, reduce_everything, [replicas for size, replicas in LAYOUTS if size == world_size])


def reduce_everything(nums_replicas: list[int]) -> dict[tuple[int, Case], torch.Tensor]:
    topologies = {num_replicas: make_topology(num_replicas) for num_replicas in nums_replicas}
    return {
        (num_replicas, case): reduce_everywhere(topologies[num_replicas], *case)
        for num_replicas, case in itertools.product(nums_replicas, CASES)
    }


def make_topology(num_replicas: int) -> Topology:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    shards = world_size // num_replicas
    shard_groups = [dist.new_group(range(r * shards, (r + 1) * shards)) for r in range(num_replicas)]
    replicate_groups = [dist.new_group(range(s, world_size, shards)) for s in range(shards)]
    return Topology(
        num_replicas=num_replicas,
        shard_size=shards,
        rank=rank,
        shard_group=shard_groups[rank // shards],
        replicate_group=replicate_groups[rank % shards],
    )


def reduce_everywhere(
    topology: Topology, num_microbatches: int, numel: int, local: bool, messages: bool
) -> torch.Tensor:
    """Drive one unit's reduction by hand, as FSDP does; this rank's whole, gathered gradient."""
    slices.by_messages = lambda _: messages  # in this process of its own
    shards = topology.shard_size
    rounds = Rounds(num_microbatches, dist.get_world_size(), local)
    reduction = InvariantReduction(topology, rounds)
    padded = -(-numel // shards) * shards
    output = torch.zeros(padded // shards)
    for _ in rounds:
        index = rounds.microbatch(topology.rank)
        leaf = reduction.allocate([padded], dtype=torch.float32, device=torch.device("cpu")).zero_()
        leaf[:numel] = leaf_of(index, numel) if index is not None else torch.full((numel,), torch.nan)
        output = reduction.allocate([padded // shards], dtype=torch.float32, device=torch.device("cpu"))
        if shards > 1:
            reduction(output, leaf, topology.shard_group, dist.ReduceOp.SUM)
        else:
            output.copy_(leaf)
        reduction.finish_round(output)
    gathered = [torch.empty_like(output) for _ in range(shards)]
    dist.all_gather(gathered, output, group=topology.shard_group)
    return torch.cat(gathered)[:numel]


def leaf_of(index: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(index)) * 10.0 ** (index % 5)


@pytest.mark.parametrize(("world_size", "num_replicas"), LAYOUTS)
@pytest.mark.parametrize("local", [True, False], ids=["local", "sharded"])
@pytest.mark.parametrize("messages", [True, False], ids=["messages", "collectives"])
def test_every_layout_builds_the_same_tree(world_size: int, num_replicas: int, local: bool, messages: bool) -> None:
    cases = [case for case in CASES if case[2:] == (local, messages)]
    for case in cases:
        num_microbatches, numel, *_ = case
        expected = tree_by_definition([leaf_of(i, numel) for i in range(num_microbatches)]) + 0.0
        for rank in reduced(world_size):
            assert torch.equal(rank[num_replicas, case], expected)


def test_a_gradient_on_a_gpu_is_kept_for_the_stream_that_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaf:
        is_cuda = True
        streams: ClassVar[list[str]] = []

        def numel(self) -> int:
            return 4

        def record_stream(self, stream: str) -> None:
            self.streams.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "reduce-scatter")
    group: Any = None
    topology = Topology(num_replicas=1, shard_size=2, rank=0, replicate_group=group, shard_group=group)
    leaf: Any = Leaf()
    reduction = InvariantReduction(topology, Rounds(4, 2, local=True))
    reduction(leaf, leaf, group, dist.ReduceOp.SUM)  # the first of two rounds: nothing is sent yet
    assert leaf.streams == ["reduce-scatter"]
