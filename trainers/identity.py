"""Whether what a run does not change is still what it was: frozen parts of the model, and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from trainers.errors import ConfigError


def tensors_hash(module: nn.Module) -> str:
    """XXH3-128 of every tensor of `module`: names, dtypes, shapes and bytes, in order of names."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_hashes(recorded: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Check that a run goes on with the frozen parts and the data that it began with.

    Raises:
        ConfigError: one of them is another; names it with both hashes.
    """
    for name in sorted(recorded.keys() | actual.keys()):
        if recorded.get(name) != actual.get(name):
            raise ConfigError(
                f"{_what(name)} is not the one that the run was trained with"
                f" (hash {json.dumps(actual.get(name))}, in the checkpoint {json.dumps(recorded.get(name))});"
                " put the old one back, or start a run of another name"
            )


def agreed(hashes: dict[str, str]) -> dict[str, str]:
    """`hashes`, which must be the same on all ranks. Collective: all ranks.

    Raises:
        ConfigError: on every rank, if those of one are others; names it with both hashes.
    """
    every = [hashes] * dist.get_world_size()
    dist.all_gather_object(every, hashes)
    for rank, theirs in enumerate(every):
        for name in sorted(every[0].keys() | theirs.keys()):
            first, other = every[0].get(name), theirs.get(name)
            if first != other:
                raise ConfigError(
                    f"{_what(name)} of rank {rank} is not that of rank 0 (hash {json.dumps(other)}, there"
                    f" {json.dumps(first)}); give every node the same files (data.cache may know older ones)"
                )
    return hashes


def _what(name: str) -> str:
    if name == "data":
        return "data.path: the data"
    return f"model.pretrained or conditioning.text_encoder: the frozen part {name}"


def check_encoders(made_with: Mapping[str, str], hashes: Mapping[str, str], where: str) -> None:
    """Check that latents in the data are those that the run's own frozen parts would make.

    Raises:
        ConfigError: other parts have made them; names one with both hashes.
    """
    for name, recorded in sorted(made_with.items()):
        if hashes.get(name) != recorded:
            raise ConfigError(
                f"data.path={where} was made with another {name} (hash {recorded}) than model.pretrained has"
                f" ({hashes.get(name)}), or in another conditioning.precision; take the model that made it, or run"
                " `unbroken data prepare` into another folder"
            )
