"""The first values of a sharded model's parameters: every rank gets its rows, none of them holds the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from trainers.models import ModelConfig, build_model, pretrained_weights, stored_name
from trainers.parallel import LocalParameter, kept_buffers


@torch.no_grad()
def load_initial_weights(
    config: ModelConfig, seed: int, model: nn.Module, parameters: Sequence[LocalParameter]
) -> None:
    """Fill the local rows and the buffers of `model`, bitwise as `build_model` makes them. Collective: all ranks.

    Pretrained weights are read row by row from the files. Random ones exist on rank 0 only, in the memory of the
    host: how a class draws them is its own affair, and no part can be drawn without the parts before it.

    Raises:
        ConfigError: the pretrained weights are not there, or are those of another model.
    """
    if config.pretrained is not None and not config.from_scratch:
        _read(config, seed, model, parameters)
    else:
        _broadcast(build_model(config, seed) if dist.get_rank() == 0 else None, model, parameters)


def _read(config: ModelConfig, seed: int, model: nn.Module, parameters: Sequence[LocalParameter]) -> None:
    weights = pretrained_weights(config, model)
    for parameter in parameters:
        start, stop = parameter.row_offset, parameter.row_offset + len(parameter.local)
        stored = stored_name(parameter.name)
        if stored is None:
            assert config.lora is not None
            parameter.local.copy_(config.lora.initial(parameter.name, parameter.shape, seed)[start:stop])
        elif stop > start:
            parameter.local.copy_(weights.rows(stored, start, stop))
    for name, buffer in kept_buffers(model).items():
        buffer.copy_(weights.whole(name))


def _broadcast(whole: nn.Module | None, model: nn.Module, parameters: Sequence[LocalParameter]) -> None:
    source = dict(whole.named_parameters()) if whole is not None else {}
    for parameter in parameters:
        local = parameter.local
        if whole is not None:
            rows = source[parameter.name].to(local.device)
        else:
            rows = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        dist.broadcast(rows, 0)
        local.copy_(rows[parameter.row_offset : parameter.row_offset + len(local)])
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():
        if whole is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
