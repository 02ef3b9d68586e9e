from __future__ import annotations

import itertools
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from tests.trainers.test_tree import tree_by_definition
from trainers.reduction import InvariantReduction, Rounds, Topology

LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)]
"""Number of ranks, and of replicas."""
NUMS_MICROBATCHES = (6, 7, 11)
NUMEL = 101


@cache
def reduced(world_size: int) -> list[dict[tuple[int, int, bool], torch.Tensor]]:
    """Every case of this world size, by rank; in one group of processes, as starting those takes longest."""
    return run_ranks(world_size, reduce_everything, [replicas for size, replicas in LAYOUTS if size == world_size])


def reduce_everything(nums_replicas: list[int]) -> dict[tuple[int, int, bool], torch.Tensor]:
    topologies = {num_replicas: make_topology(num_replicas) for num_replicas in nums_replicas}
    cases = itertools.product(nums_replicas, NUMS_MICROBATCHES, (True, False))
    return {case: reduce_everywhere(topologies[case[0]], *case[1:]) for case in cases}


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


def reduce_everywhere(topology: Topology, num_microbatches: int, local: bool) -> torch.Tensor:
    """Drive one unit's reduction by hand, as FSDP does; this rank's whole, gathered gradient."""
    shards = topology.shard_size
    rounds = Rounds(num_microbatches, dist.get_world_size(), local)
    reduction = InvariantReduction(topology, rounds)
    padded = -(-NUMEL // shards) * shards
    output = torch.zeros(padded // shards)
    for _ in rounds:
        index = rounds.microbatch(topology.rank)
        leaf = reduction.allocate([padded], dtype=torch.float32, device=torch.device("cpu")).zero_()
        leaf[:NUMEL] = leaf_of(index) if index is not None else torch.full((NUMEL,), torch.nan)
        output = reduction.allocate([padded // shards], dtype=torch.float32, device=torch.device("cpu"))
        if shards > 1:
            reduction(output, leaf, topology.shard_group, dist.ReduceOp.SUM)
        else:
            output.copy_(leaf)
        reduction.finish_round(output)
    gathered = [torch.empty_like(output) for _ in range(shards)]
    dist.all_gather(gathered, output, group=topology.shard_group)
    return torch.cat(gathered)[:NUMEL]


def leaf_of(index: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(index)) * 10.0 ** (index % 5)


@pytest.mark.parametrize(("world_size", "num_replicas"), LAYOUTS)
@pytest.mark.parametrize("local", [True, False], ids=["local", "sharded"])
def test_every_layout_builds_the_same_tree(world_size: int, num_replicas: int, local: bool) -> None:
    for num_microbatches in NUMS_MICROBATCHES:
        expected = tree_by_definition([leaf_of(i) for i in range(num_microbatches)]) + 0.0
        for rank in reduced(world_size):
            assert torch.equal(rank[num_replicas, num_microbatches, local], expected)


def test_a_gradient_on_a_gpu_is_kept_for_the_stream_that_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaf:
        is_cuda = True
        streams: ClassVar[list[str]] = []

        def record_stream(self, stream: str) -> None:
            self.streams.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "reduce-scatter")
    group: Any = None
    topology = Topology(num_replicas=1, shard_size=2, rank=0, replicate_group=group, shard_group=group)
    leaf: Any = Leaf()
    reduction = InvariantReduction(topology, Rounds(4, 2, local=True))
    reduction(leaf, leaf, group, dist.ReduceOp.SUM)  # the first of two rounds: nothing is sent yet
    assert leaf.streams == ["reduce-scatter"]
