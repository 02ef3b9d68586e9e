from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.norm import StepSums, clip_
from trainers.parallel import LocalParameter, gather_rows
from trainers.reduction import Topology
from trainers.tree import halve


def norm_and_reference(max_norm: float) -> tuple[float, float, float, float]:
    """With a gradient everywhere: our norm, torch's of the whole gradients, the loss, the norm once clipped."""
    state, task = build_tiny(tiny_config(parallel={"strategy": "fsdp"}))
    generator = torch.Generator().manual_seed(3)
    whole = []
    for parameter in state.parameters:
        grad = torch.randn(parameter.shape, generator=generator)
        whole.append(grad)
        parameter.parameter.grad = parameter.parameter.detach().clone()
        local = parameter.local_grad()
        assert local is not None
        local.copy_(grad[parameter.row_offset : parameter.row_offset + len(local)])
    losses = torch.zeros(4)
    losses[state.topology.rank] = 2.0 + state.topology.rank
    loss, norm, _ = task.sums(losses)
    clip_(state.parameters, norm, max_norm)
    clipped = [gather_rows(p.local_grad(), p, state.topology) for p in state.parameters]  # type: ignore[arg-type]
    reference = torch.nn.utils.get_total_norm(whole).item()
    return norm.item(), reference, loss.item(), torch.nn.utils.get_total_norm(clipped).item()


@pytest.mark.parametrize("world_size", [1, 3])
def test_norm_loss_and_clipping(world_size: int) -> None:
    norm, reference, loss, clipped = run_ranks(world_size, norm_and_reference, 5.0)[0]
    # A tolerance, because torch adds in another order; our own order is compared bitwise in test_invariance.
    assert norm == pytest.approx(reference, rel=1e-5)
    assert loss == sum(2.0 + rank for rank in range(world_size)) / 4
    assert clipped == pytest.approx(5.0, rel=1e-4)


def test_a_small_gradient_is_left_as_it_is() -> None:
    norm, _, _, clipped = run_ranks(1, norm_and_reference, 1e9)[0]
    assert clipped == pytest.approx(norm, rel=1e-6)


def distance_and_reference(shapes: list[tuple[int, ...]]) -> tuple[float, float]:
    """As two replicas that hold all: our distance of averages from weights, and that by the definition."""
    generator = torch.Generator().manual_seed(5)
    topology = Topology(
        num_replicas=2,
        shard_size=1,
        rank=dist.get_rank(),
        replicate_group=dist.group.WORLD,  # type: ignore[arg-type]
        shard_group=dist.group.WORLD,  # type: ignore[arg-type]
    )
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    averages = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    parameters = [
        LocalParameter(name=str(i), shape=shape, row_offset=0, parameter=torch.nn.Parameter(weight), local=weight)
        for i, (shape, weight) in enumerate(zip(shapes, weights, strict=True))
    ]
    sums = StepSums(parameters, topology, torch.device("cpu"))
    sums.distances({"main": averages})  # what it leaves in its memory must not matter
    found = sums.distances({"main": averages})["main"]
    differences = [weight - average for weight, average in zip(weights, averages.values(), strict=True)]
    return found, _size(differences) / _size(weights)


def _size(tensors: list[torch.Tensor]) -> float:
    rows = [halve((tensor * tensor).reshape(len(tensor), -1)) for tensor in tensors if tensor.numel()]
    return halve(torch.cat(rows)).sqrt().item()


def test_rows_of_every_width_are_folded_in_half() -> None:
    # Of one element, of as many as are left to the end and one more, of odd halves; many of them; wider than a block.
    shapes = [(5,), (3, 64), (4, 65), (7, 5, 13), (2, 3, 43), (700, 1000), (3, 1023), (9000, 40), (3, 300_001), (1, 2)]
    for found, expected in run_ranks(2, distance_and_reference, shapes):
        assert found == expected
