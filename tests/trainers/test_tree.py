from __future__ import annotations

import pytest
import torch

from trainers.tree import TreeSum, aligned_heights, halve


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
