"""The environment that torchrun makes, for libraries that look for nothing else."""

from __future__ import annotations

import os

import torch.distributed as dist

from bench.programs import free_port


def name_the_group() -> None:
    """Say which rank this is. Collective: none; the process group that is there is the one that will be used."""
    world = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))  # they ask for an address too
