from __future__ import annotations

from typing import Any

import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import DIT, build_tiny, tiny_config
from trainers.step import train_step


def given_to_blocks(config: dict[str, Any]) -> dict[str, torch.dtype]:
    """What the last block of a DiT is given in one step, and the dtype it computes in. Collective."""
    state, task = build_tiny(config)
    found: dict[str, torch.dtype] = {}

    def look(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found["hidden_states"], found["timestep"] = arguments[0].dtype, keywords["timestep"].dtype
        found["weights"] = next(module.parameters()).dtype

    model: Any = state.model
    model.transformer_blocks[-1].attn1.register_forward_pre_hook(
        lambda module, arguments: found.update(attention=arguments[0].dtype)
    )
    model.transformer_blocks[-1].register_forward_pre_hook(look, with_kwargs=True)
    train_step(state, task)
    return found


def test_timesteps_reach_the_blocks_as_they_were_drawn() -> None:
    """bfloat16 has 8 bits: of a timestep of 999 it would make 1000."""
    objective = {"prediction_type": "flow", "weighting": "none", "label_drop": 0.0}
    config = tiny_config(DIT, objective=objective, train={"precision": "bf16"})
    (found,) = run_ranks(1, given_to_blocks, config)
    half, whole = torch.bfloat16, torch.float32
    assert found == {"hidden_states": half, "timestep": whole, "weights": half, "attention": half}
