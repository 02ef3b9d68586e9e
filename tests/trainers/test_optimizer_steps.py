"""A checkpoint has one count of updates: right for what has a gradient in every step, or in none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.errors import ConfigError
from trainers.state import TrainState, fingerprints
from trainers.step import Task, train_step


def _embed_in(steps: Sequence[int], state: TrainState) -> None:
    """Labels train their embedding in these steps only."""

    def detach(module: torch.nn.Module, given: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded if state.progress.step + 1 in steps else embedded.detach()

    state.model.class_embedding.register_forward_hook(detach)  # type: ignore[union-attr]


def _halves(config: dict[str, Any], embed_in: Sequence[int]) -> tuple[dict[str, int], dict[str, int]]:
    """After six steps: of a state that took all of them, and of one that was restored after the third."""
    (state, task), (again, task_again) = build_tiny(config), build_tiny(config)
    for each in (state, again):
        _embed_in(embed_in, each)
    _train(state, task, 3)
    again.load_scalars(state.scalars())
    for ours, theirs in zip(again.tensors(), state.tensors(), strict=True):
        ours.tensor.copy_(theirs.tensor)
    again.progress = state.progress
    _train(state, task, 3)
    _train(again, task_again, 3)
    return fingerprints(state), fingerprints(again)


def _train(state: TrainState, task: Task, num_steps: int) -> None:
    for _ in range(num_steps):
        train_step(state, task)


def _never_used(optimizer: dict[str, Any], strategy: str) -> bool:
    straight, restored = _halves(tiny_config(optimizer=optimizer, parallel={"strategy": strategy}), embed_in=())
    return straight == restored


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [({}, "fsdp"), ({"name": "rmsprop", "momentum": 0.9}, "ddp"), ({"name": "adafactor", "lr": 1e-2}, "ddp")],
)
def test_a_parameter_that_is_never_used_makes_no_difference_to_a_restore(
    optimizer: dict[str, Any], strategy: str
) -> None:
    if optimizer:
        optimizer = {"weight_decay": 0.01, "clip_norm": None, **optimizer}
    assert run_ranks(2, _never_used, optimizer, strategy) == [True, True]


def _used_from_the_fifth_step_on(parallel: dict[str, str]) -> None:
    state, task = build_tiny(tiny_config(parallel=parallel))
    _embed_in((5, 6), state)
    _train(state, task, 4)
    with pytest.raises(ConfigError, match=r"model: some parameters take part in some microbatches or steps only"):
        _train(state, task, 1)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {"strategy": "ddp"}), (2, {"strategy": "fsdp"}), (2, {"strategy": "fsdp", "reduction": "fast"})],
)
def test_a_parameter_that_is_used_in_some_steps_only_is_refused(world_size: int, parallel: dict[str, str]) -> None:
    run_ranks(world_size, _used_from_the_fifth_step_on, parallel)
