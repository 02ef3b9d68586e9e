from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from trainers.reduction import InvariantReduction, Rounds, Topology, TreeSum, aligned_heights, halve


def tree_by_definition(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The tree written down level by level: pair equal heights, then fold what is left over from the right."""
    nodes = [(0, leaf) for leaf in leaves]
    merged = True
    while merged:
        merged = False
        for i in range(len(nodes) - 1):
            if nodes[i][0] == nodes[i + 1][0]:
                nodes[i : i + 2] = [(nodes[i][0] + 1, nodes[i][1] + nodes[i + 1][1])]
                merged = True
                break
    total = nodes.pop()[1]
    while nodes:
        total = nodes.pop()[1] + total
    return total


@pytest.mark.parametrize("count", range(1, 18))
def test_streaming_sum_is_the_tree(count: int) -> None:
    leaves = list(torch.randn(count, 33, generator=torch.Generator().manual_seed(count)))
    tree = TreeSum()
    for leaf in leaves:
        tree.push(leaf.clone())
    assert torch.equal(tree.finish(), tree_by_definition(leaves))


@pytest.mark.parametrize("stop", range(1, 20))
def test_a_sum_that_begins_later_keeps_the_nodes_of_the_tree(stop: int) -> None:
    leaves = list(torch.randn(stop, 33, generator=torch.Generator().manual_seed(stop)))
    for start in range(stop):
        tree = TreeSum(start)
        for leaf in leaves[start:]:
            tree.push(leaf.clone())
        first = start
        for height, node in zip(aligned_heights(start, stop), tree.nodes(), strict=True):
            assert torch.equal(node, tree_by_definition(leaves[first : first + (1 << height)]))
            first += 1 << height


def test_the_tree_is_not_just_any_sum() -> None:
    leaves = list(torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)))
    in_order = torch.stack(leaves).cumsum(0)[-1]
    assert not torch.equal(tree_by_definition(leaves), in_order)


@pytest.mark.parametrize("stop", range(1, 20))
def test_aligned_nodes_cover_their_leaves_and_are_aligned(stop: int) -> None:
    for start in range(stop):
        first = start
        for height in aligned_heights(start, stop):
            assert first % (1 << height) == 0
            first += 1 << height
        assert first == stop


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8, 129, 1000])
def test_halving_depends_on_the_row_alone(length: int) -> None:
    rows = torch.randn(6, length, generator=torch.Generator().manual_seed(length))
    whole = halve(rows)
    assert torch.equal(whole, torch.stack([halve(row) for row in rows]))
    torch.testing.assert_close(whole.double(), rows.double().sum(-1), rtol=1e-5, atol=1e-5)


def reduce_everywhere(num_replicas: int, num_microbatches: int, numel: int, local: bool) -> torch.Tensor:
    """Drive one unit's reduction by hand, as FSDP does; this rank's whole, gathered gradient."""
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
    total = torch.zeros(padded // shards)
    for _ in rounds:
        index = rounds.microbatch(rank)
        leaf = torch.zeros(padded)
        leaf[:numel] = leaf_of(index, numel) if index is not None else torch.full((numel,), torch.nan)
        output = torch.empty(padded // shards)
        if shards > 1:
            reduction(output, leaf, topology.shard_group, dist.ReduceOp.SUM)
        else:
            output.copy_(leaf)
        reduction.finish_round(output)
        total += output
    gathered = [torch.empty_like(total) for _ in range(shards)]
    dist.all_gather(gathered, total, group=topology.shard_group)
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
