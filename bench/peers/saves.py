"""What others use to save and restore, on the state of one of our trainers."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.peers.environment import name_the_group
from trainers.state import LocalTensor, TrainState

Turn = Callable[[Path], Iterator[None]]


class Peers:
    """Turns of `bench.save_turns`. Those that load read what they have saved in `folder` before."""

    def __init__(self, state: TrainState, folder: Path) -> None:
        self._log = folder / f"background-{dist.get_rank()}.log"
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._sharded = {local.spec.name: _as_dtensor(local, mesh) for local in state.tensors()}
        self._local = {local.spec.name: local.tensor.detach() for local in state.tensors()}

    def turns(self) -> dict[str, Turn]:
        saves: dict[str, Turn] = {
            "torch DCP save": self._dcp,
            "torch DCP async_save, thread": lambda scratch: self._dcp_async(scratch, AsyncCheckpointerType.THREAD),
            "torch DCP async_save, process": lambda scratch: self._dcp_async(scratch, AsyncCheckpointerType.PROCESS),
            "torch_checkpointing": self._managed,
            "torch.save of every rank": self._torch_save,
            "accelerate save_state": self._accelerate,
            "Lightning Fabric.save": lambda scratch: self._lightning.save(scratch),
        }
        loads: dict[str, Callable[[Path], object]] = {
            "torch DCP save": lambda scratch: dcp.load(self._sharded, checkpoint_id=scratch),
            "torch_checkpointing": lambda scratch: self._manager.load(scratch),
            "torch.save of every rank": self._torch_load,
            "accelerate save_state": lambda scratch: self._accelerator.load_state(str(scratch)),
            "Lightning Fabric.save": lambda scratch: self._lightning.load(scratch),
        }
        return saves | {
            f"load {name}": lambda scratch, name=name, load=load: _load(scratch, saves[name], load)
            for name, load in loads.items()
        }

    def _dcp(self, scratch: Path) -> Iterator[None]:
        dcp.save(self._sharded, checkpoint_id=scratch)
        yield

    @cached_property
    def _stager(self) -> DefaultStager:
        """Kept, so that it copies into the same memory again, which the background process shares."""
        return DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )

    def _dcp_async(self, scratch: Path, kind: AsyncCheckpointerType) -> Iterator[None]:
        with _stderr_in(self._log):
            saved = dcp.async_save(
                self._sharded, checkpoint_id=scratch, async_checkpointer_type=kind, async_stager=self._stager
            )
            yield
            cast(Future[Any], saved).result()

    def _managed(self, scratch: Path) -> Iterator[None]:
        with _stderr_in(self._log):
            yield from self._manager.save(scratch)

    @cached_property
    def _manager(self) -> Any:
        return importlib.import_module("bench.peers.manager_saves").ManagerSaves(self._sharded)

    @cached_property
    def _lightning(self) -> Any:
        return importlib.import_module("bench.peers.lightning_saves").LightningSaves(self._sharded)

    def _torch_save(self, scratch: Path) -> Iterator[None]:
        torch.save(self._local, scratch / f"{dist.get_rank()}.pt")
        yield

    def _torch_load(self, scratch: Path) -> None:
        for name, value in torch.load(scratch / f"{dist.get_rank()}.pt").items():
            self._local[name].copy_(value)

    def _accelerate(self, scratch: Path) -> Iterator[None]:
        """As in the training scripts of diffusers: every rank holds all of the state, and the first one writes it."""
        self._accelerator.save_state(str(scratch))
        yield

    @cached_property
    def _accelerator(self) -> Any:
        return _accelerator(self._sharded)


def _load(scratch: Path, save: Turn, load: Callable[[Path], object]) -> Iterator[None]:
    """The first turn only makes what the others read."""
    saved = not any(scratch.iterdir())
    dist.barrier()
    if saved:
        for _ in save(scratch):
            pass
    else:
        load(scratch)
    yield


@contextlib.contextmanager
def _stderr_in(log: Path) -> Iterator[None]:
    """Of a process that is started now: what it says of its work, and of its end when this process has ended.

    Its errors come back as exceptions; then all that it said is shown.
    """
    kept = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    except BaseException:
        os.write(kept, log.read_bytes())
        raise
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
    name_the_group()
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
