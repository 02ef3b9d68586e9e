from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

# Private path: whose methods FSDP's hooks are.
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from tests.trainers.distributed import run_ranks
from tests.trainers.test_tree import tree_by_definition
from trainers.parallel import ParallelConfig, drop_gradients, gather_for_good, make_topology, shard_model
from trainers.reduction import Rounds
from trainers.replicated import reduce_directly

NUM_MICROBATCHES = 4
ABSENT = {"blocks.1.idle.weight", "blocks.2.used.weight", "blocks.2.idle.weight"}
"""What no backward pass reaches, or what is not trained: a part of a unit, a whole unit, and what is frozen."""
FROZEN = "blocks.0.idle.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4, bias=False)
        self.idle = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.used(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks[1](self.blocks[0](x))).mean()


def make_model() -> Model:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model = Model()
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


def loss_of(model: nn.Module, microbatch: int) -> torch.Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(microbatch))
    return model(x) / NUM_MICROBATCHES


def gradients(num_steps: int, local: bool) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Of every step, all alike, by name; and how many hooks FSDP has left."""
    model, config = make_model(), ParallelConfig(strategy="ddp")
    topology, mesh = make_topology(config, torch.device("cpu"))
    rounds = Rounds(NUM_MICROBATCHES, dist.get_world_size(), local)
    whole = gather_for_good(model, shard_model(model, config, topology, mesh, rounds, bf16=False))
    whole = reduce_directly(model, whole, topology, rounds)
    found = []
    for _ in range(num_steps):
        for _ in rounds:
            drop_gradients(whole)
            index = rounds.microbatch(topology.rank)
            # A rank without a microbatch takes part with another one, which does not count.
            loss_of(model, NUM_MICROBATCHES - 1 if index is None else index).backward()
        grads = {parameter.name: parameter.local_grad() for parameter in whole}
        found.append({name: grad.clone() for name, grad in grads.items() if grad is not None})
        drop_gradients(whole)
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return found, sum(isinstance(getattr(hook, "__self__", None), FSDPState) for hook in hooks)


def expected_gradients() -> dict[str, torch.Tensor]:
    leaves = []
    for index in range(NUM_MICROBATCHES):
        model = make_model()
        loss_of(model, index).backward()
        leaves.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: tree_by_definition([leaf[name] for leaf in leaves]) + 0.0 for name in leaves[0]}


def test_gradients_are_the_tree_of_those_that_autograd_makes() -> None:
    expected = expected_gradients()
    names = {name for name, _ in make_model().named_parameters()}
    assert expected.keys() == names - ABSENT - {FROZEN}
    for world_size, local in ((1, True), (2, True), (3, True), (2, False)):
        for steps, num_hooks in run_ranks(world_size, gradients, 2, local):
            assert num_hooks == 0
            for found in steps:
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in expected)
