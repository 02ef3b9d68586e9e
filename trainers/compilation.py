"""torch.compile, block by block, in a way that keeps the contract."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from trainers.errors import ConfigError
from trainers.units import compilable_blocks

_OPTIONS = {
    "deterministic": True,  # no choice between kernels by the time they take, as that would decide numbers
    "compile_threads": 1,  # no workers of its own: they would outlive a trainer that is killed
}
_MOST_GRAPHS = 256
"""Of one class of blocks: one for each of their shapes. A run has as many as its model; more are our own bug."""


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Have forward and backward of every block compiled when it first runs, in training only. Local.

    Blocks of one class and shape share one graph, so a transformer takes the time of one block.
    In place, before the model is sharded: FSDP's hooks stay outside of the graphs. Shapes are never generalised: what a
    graph is made for would depend on what was seen before, and so on the history of failures. Validation and samples,
    whose shapes are many, run without.

    Raises:
        ConfigError: there is no compiler on this machine.
    """
    names = [name for name in torch._inductor.config.cpp.cxx if name]
    if device.type == "cpu" and not any(map(shutil.which, names)):
        raise ConfigError(f"model.compile=true needs {' or '.join(names)}; install it, or set model.compile=false")
    # Beyond the limit torch would run a block without its graph, with other numbers, and say so in a log line.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in compilable_blocks(model):
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, options=cast(Any, _OPTIONS))
        block.forward = _in_training(block.forward, compiled)


def _in_training(eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return forward
