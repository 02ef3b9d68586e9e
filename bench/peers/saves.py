"""What others use to save and restore, on the state of one of our trainers."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainers.state import LocalTensor, TrainState

Turn = Callable[[Path], Iterator[None]]


class Peers:
    """Turns of `bench.save_turns`. Those that load read what they have saved in `folder` before."""

    def __init__(self, state: TrainState, folder: Path) -> None:
        self._folder = folder
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._sharded = {local.spec.name: _as_dtensor(local, mesh) for local in state.tensors()}
        self._local = {local.spec.name: local.tensor.detach() for local in state.tensors()}
        self._accelerator: Any = None

    def turns(self) -> dict[str, Turn]:
        saves: dict[str, Turn] = {
            "torch DCP save": self._dcp,
            "torch DCP async_save, thread": lambda scratch: self._dcp_async(scratch, AsyncCheckpointerType.THREAD),
            "torch DCP async_save, process": lambda scratch: self._dcp_async(scratch, AsyncCheckpointerType.PROCESS),
            "torch.save of every rank": self._torch_save,
            "accelerate save_state": self._accelerate,
        }
        loads: dict[str, Turn] = {
            "load torch DCP": lambda scratch: self._load(scratch, self._dcp, self._dcp_load),
            "load torch.save of every rank": lambda scratch: self._load(scratch, self._torch_save, self._torch_load),
        }
        return saves | loads

    def _dcp(self, scratch: Path) -> Iterator[None]:
        dcp.save(self._sharded, checkpoint_id=scratch)
        yield

    def _dcp_async(self, scratch: Path, kind: AsyncCheckpointerType) -> Iterator[None]:
        saved = dcp.async_save(self._sharded, checkpoint_id=scratch, async_checkpointer_type=kind)
        yield
        cast(Future[Any], saved).result()

    def _torch_save(self, scratch: Path) -> Iterator[None]:
        torch.save(self._local, scratch / f"{dist.get_rank()}.pt")
        yield

    def _accelerate(self, scratch: Path) -> Iterator[None]:
        """As in the training scripts of diffusers: every rank holds all of the state, and the first one writes it."""
        self._accelerator = self._accelerator or _accelerator(self._sharded)
        self._accelerator.save_state(str(scratch))
        yield

    def _load(self, scratch: Path, save: Turn, load: Callable[[Path], None]) -> Iterator[None]:
        """The first turn only makes what the others read."""
        saved = not any(scratch.iterdir())
        dist.barrier()
        if saved:
            for _ in save(scratch):
                pass
        else:
            load(scratch)
        yield

    def _dcp_load(self, scratch: Path) -> None:
        dcp.load(self._sharded, checkpoint_id=scratch)

    def _torch_load(self, scratch: Path) -> None:
        for name, value in torch.load(scratch / f"{dist.get_rank()}.pt").items():
            self._local[name].copy_(value)


def _as_dtensor(local: LocalTensor, mesh: DeviceMesh) -> torch.Tensor:
    if local.num_replicas > 1 or not local.tensor.ndim:
        return local.tensor.detach()
    shape, stride = torch.Size(local.spec.shape), [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    rows = local.tensor.detach().view(-1, *shape[1:])
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=tuple(stride))


def _accelerator(tensors: dict[str, torch.Tensor]) -> Any:
    """With as many bytes as the state has: parameters, two moments of each, and an EMA."""
    with socket.socket() as free:  # it asks for an address, and then uses the process group that is there
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update(
        {name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    shapes = [value.shape for name, value in tensors.items() if name.startswith("model/") and value.is_floating_point()]
    model = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(torch.optim.swa_utils.AveragedModel(accelerator.unwrap_model(model)))
    return accelerator
