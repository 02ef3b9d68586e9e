"""The estimate of `config show --memory` against the bytes that a trainer really holds."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import UNET, build_tiny, tiny_config
from trainers import step
from trainers.config import TrainerConfig
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.memory import RankMemory, rank_memory

WAYS = {
    "local": {"strategy": "fsdp", "accumulation": "local"},
    "sharded": {"strategy": "fsdp", "accumulation": "sharded"},
    "ddp": {"strategy": "ddp", "accumulation": "local"},
    "fast": {"strategy": "fsdp", "reduction": "fast"},
}
WORLD_SIZE = 2


def config(way: str) -> dict[str, Any]:
    # 8 microbatches, 4 a worker: up to three sums of gradients wait at once, of 4, 2 and 1 of them less one each.
    return tiny_config(UNET, parallel=WAYS[way], train={"global_batch_size": 32, "microbatch_size": 4})


def live_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    found = [
        value for value in gc.get_objects() if issubclass(type(value), torch.Tensor) and type(value) is not DTensor
    ]
    found += [value.grad for value in found if value.is_leaf and value.grad is not None]
    storages = [tensor.untyped_storage() for tensor in found if type(tensor) is not DTensor and not tensor.is_meta]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def measure(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What this rank holds of each kind in its second step. Collective."""
    return {name: measure_one(config) for name, config in configs.items()}


def measure_one(plain: dict[str, Any]) -> dict[str, int]:
    state, task = build_tiny(plain)
    step.train_step(state, task)
    at_rounds, gradients, begin_round = [], [], step.begin_round

    def note(*arguments: Any) -> None:
        at_rounds.append(live_bytes())
        begin_round(*arguments)

    def sums(losses: torch.Tensor) -> Any:
        gradients.append(size(parameter.local_grad() for parameter in state.parameters))
        return task.sums(losses)

    step.begin_round = note
    try:
        step.train_step(state, replace(task, sums=sums))
    finally:
        step.begin_round = begin_round
    return {
        "parameters": size(parameter.local for parameter in state.parameters),
        "gradients": gradients[0],
        "between": max(at_rounds) - at_rounds[0],
        "optimizer": size(slot[key] for slot in state.optimizer.state.values() for key in state.moments),
        "ema": size(tensor for profile in state.ema.tensors().values() for tensor in profile.values()),
    }


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """Of rank 0, which has the larger shards."""
    return run_ranks(WORLD_SIZE, measure, {way: config(way) for way in WAYS})[0]


def estimate(way: str) -> RankMemory:
    decoded = decode(TrainerConfig, config(way))
    return rank_memory(decoded, open_source(decoded.data), WORLD_SIZE)


@pytest.mark.parametrize("way", WAYS)
def test_the_estimate_is_what_a_rank_holds(measured: dict[str, dict[str, int]], way: str) -> None:
    expected, found = estimate(way), measured[way]
    for kind in ("parameters", "gradients", "optimizer", "ema"):
        assert getattr(expected, kind) == found[kind], kind

    # FSDP pads every parameter to whole rows a rank, and has its shards of the gradient from the first round on.
    # Without shards one of the sums lies where the gradient of the step before lay.
    kept = expected.accumulation + {"fast": 0, "ddp": -1}.get(way, 1) * expected.gradients
    assert kept <= found["between"] < 1.1 * kept


def test_every_byte_is_in_the_total() -> None:
    found = estimate("local")
    assert found.accumulation > 2 * found.parameters and found.activations is not None
    assert found.total == sum(asdict(found).values())
