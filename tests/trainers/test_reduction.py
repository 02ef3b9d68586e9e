from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from tests.trainers.test_tree import tree_by_definition
from trainers import slices
from trainers.reduction import InvariantReduction, Rounds, Topology


def reduce_everywhere(
    num_replicas: int, num_microbatches: int, numel: int, local: bool, messages: bool = True
) -> torch.Tensor:
    """Drive one unit's reduction by hand, as FSDP does; this rank's whole, gathered gradient."""
    slices.by_messages = lambda _: messages
    world_size, rank = dist.get_world_size(), dist.get_rank()
    shards = world_size // num_replicas
    shard_groups = [dist.new_group(range(r * shards, (r + 1) * shards)) for r in range(num_replicas)]
    replicate_groups = [dist.new_group(range(s, world_size, shards)) for s in range(shards)]
    topology = Topology(
        num_replicas=num_replicas,
        shard_size=shards,
        rank=rank,
        shard_group=shard_groups[rank // shards],
        replicate_group=replicate_groups[rank % shards],
    )
    rounds = Rounds(num_microbatches, world_size, local)
    reduction = InvariantReduction(topology, rounds)
    padded = -(-numel // shards) * shards
    output = torch.zeros(padded // shards)
    for _ in rounds:
        index = rounds.microbatch(rank)
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


@pytest.mark.parametrize(
    ("world_size", "num_replicas"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)]
)
@pytest.mark.parametrize("local", [True, False], ids=["local", "sharded"])
def test_every_layout_builds_the_same_tree(world_size: int, num_replicas: int, local: bool) -> None:
    for num_microbatches in (6, 7, 11):
        numel = 101
        expected = tree_by_definition([leaf_of(i, numel) for i in range(num_microbatches)]) + 0.0
        for result in run_ranks(world_size, reduce_everywhere, num_replicas, num_microbatches, numel, local):
            assert torch.equal(result, expected)


@pytest.mark.parametrize(("world_size", "num_replicas"), [(2, 2), (3, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("local", [True, False], ids=["local", "sharded"])
def test_the_collectives_of_a_gpu_build_the_same_tree(world_size: int, num_replicas: int, local: bool) -> None:
    for numel in (3, 101):  # with 3 elements one of four replicas owns none
        expected = tree_by_definition([leaf_of(i, numel) for i in range(7)]) + 0.0
        for messages in (True, False):
            for result in run_ranks(world_size, reduce_everywhere, num_replicas, 7, numel, local, messages):
                assert torch.equal(result, expected)


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
