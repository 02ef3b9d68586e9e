from __future__ import annotations

import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.norm import clip_
from trainers.parallel import gather_rows


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
