"""Lightning's way to save and restore sharded state: `Fabric.save` and `load` with `ModelParallelStrategy`.

`Trainer.save_checkpoint` does the same with its strategy of that name: it asks torch for sharded state dicts, hands
them to torch's distributed checkpoint, and waits. Lightning's other one, FSDP, needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]
from lightning.fabric.plugins.environments import TorchElasticEnvironment  # pyright: ignore[reportMissingImports]
from lightning.fabric.strategies import ModelParallelStrategy  # pyright: ignore[reportMissingImports]
from torch.distributed.tensor import DTensor

from bench.peers.environment import name_the_group

_MOMENTS = ("exp_avg", "exp_avg_sq")


class LightningSaves:
    """Saves and restores a trainer's DTensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Args: tensors: by the names that `TrainState.tensors` gives. Collective: all ranks."""
        name_the_group()
        world_size = dist.get_world_size()
        strategy = ModelParallelStrategy(
            parallelize_fn=lambda model, _: model,  # it is sharded already
            data_parallel_size=world_size,
            tensor_parallel_size=1,
        )
        self._fabric = Fabric(
            accelerator="cpu", devices=world_size, strategy=strategy, plugins=[TorchElasticEnvironment()]
        )
        self._fabric.launch()
        self._state = _objects({name: value for name, value in tensors.items() if isinstance(value, DTensor)})

    def save(self, scratch: Path) -> Iterator[None]:
        self._fabric.save(scratch, self._state)
        yield

    def load(self, scratch: Path) -> None:
        self._fabric.load(scratch, self._state)


def _objects(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A module and its optimizer over the very tensors.

    The EMA is buffers of the module: Lightning averages no sharded model, but saves whatever a module has.
    """
    module, names = torch.nn.Module(), {}
    for name, value in tensors.items():
        key = name.replace("/", "_").replace(".", "_")
        if name.startswith("model/"):
            names[name.removeprefix("model/")] = parameter = torch.nn.Parameter(value)
            module.register_parameter(key, parameter)
        elif name.startswith("ema/"):
            module.register_buffer(key, value)
    optimizer = torch.optim.AdamW(module.parameters())
    for name, parameter in names.items():
        moments: dict[str, Any] = {moment: tensors[f"optimizer/{moment}/{name}"] for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return {"model": module, "optimizer": optimizer}
