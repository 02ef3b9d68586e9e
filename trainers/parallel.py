"""Strategies: how parameters and gradients are spread over ranks.

All three are FSDP2 on a mesh of R replicas x S shards, so that they share one code path and one kind of number:
fsdp is 1 x W, hsdp is W/S x S, and ddp is W x 1. Parameters are DTensors on the shard dimension of the mesh; the
replicas are kept alike by the reduction in `trainers.reduction`.

Where every rank holds all parameters, in the precision that it computes in, FSDP2 gathers them once, at the start: that
copy is what is trained from then on, and the shards' own memory is given back. Otherwise it is gathered in every step.
Steps on a CPU then do without FSDP2: see `trainers.replicated`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainers.errors import ConfigError
from trainers.reduction import InvariantReduction, Rounds, Topology
from trainers.units import sharding_units


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and its gradients are spread over the workers."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """ddp: every worker holds all; fsdp: every worker holds a shard; hsdp: shards inside groups of shard_size."""
    shard_size: int = 2
    """Workers in one shard group of hsdp, >= 1; the world size must be a multiple of it."""
    reduction: Literal["invariant", "fast"] = "invariant"
    """invariant: bitwise the same numbers at every world size; fast: torch's own, the same at equal world size only."""
    accumulation: Literal["local", "sharded"] = "local"
    """Of several microbatches a worker. local: added up before they are exchanged, which takes the memory of one to
    log2(microbatches of the worker) whole gradients in float32; sharded: exchanged one by one, memory of shards only.
    Both give the same bits."""
    cpu_threads: int = 1
    """torch threads a worker on CPU, 1 to 1024. CPU kernels split sums by thread, so this decides numbers."""

    def __post_init__(self) -> None:
        for key in ("shard_size", "cpu_threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 1")
        if self.cpu_threads > 1024:
            raise ConfigError(f"cpu_threads={self.cpu_threads} is more than any machine runs; give 1024 or less")

    @property
    def cuts_tensors(self) -> bool:
        """Whether some number of workers would hold less than whole tensors each."""
        return self.strategy == "fsdp" or (self.strategy == "hsdp" and self.shard_size > 1)

    def shards(self, world_size: int) -> int:
        """S, the ranks that share one copy of the parameters."""
        if self.strategy == "ddp":
            return 1
        if self.strategy == "fsdp":
            return world_size
        if world_size % self.shard_size:
            raise ConfigError(
                f"parallel.shard_size={self.shard_size} does not divide the {world_size} workers;"
                f" use a multiple of {self.shard_size} workers or another shard_size"
            )
        return self.shard_size


@dataclass(frozen=True, kw_only=True)
class LocalParameter:
    """The rows of one parameter that live on this rank."""

    name: str
    shape: tuple[int, ...]
    """Global shape."""
    row_offset: int
    parameter: torch.nn.Parameter
    """A DTensor, and its `grad` too; with `trainers.replicated` both are plain tensors."""
    local: torch.Tensor
    """Its local rows: the memory that is trained, no part of the autograd graph. (rows, ...)"""
    computed_with: bool = False
    """The model computes with this very memory; else with what FSDP gathers of it."""

    def local_grad(self) -> torch.Tensor | None:
        """This rank's rows of the gradient, (rows, ...), or None if there is no gradient."""
        grad = self.parameter.grad
        # `to_local` makes a node of the autograd graph, which takes longer than what is done with a small gradient.
        return grad._local_tensor if isinstance(grad, DTensor) else grad


def make_topology(config: ParallelConfig, device: torch.device) -> tuple[Topology, dist.DeviceMesh]:
    """The mesh of the running process group. Collective: all ranks."""
    world_size = dist.get_world_size()
    shards = config.shards(world_size)
    mesh = init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))
    topology = Topology(
        num_replicas=world_size // shards,
        shard_size=shards,
        rank=dist.get_rank(),
        replicate_group=mesh["replicate"].get_group(),
        shard_group=mesh["shard"].get_group(),
    )
    return topology, mesh["shard"]


def shard_model(
    model: torch.nn.Module,
    config: ParallelConfig,
    topology: Topology,
    mesh: dist.DeviceMesh,
    rounds: Rounds,
    bf16: bool,
) -> list[LocalParameter]:
    """Shard `model` in place and install its gradient reduction. Collective: all ranks.

    Parameters on the meta device get memory for their local rows only, with nothing in it yet.

    Args:
        rounds: moved on by the training loop; tells the reduction which microbatches are being reduced.
        bf16: forward and backward in bfloat16, gradients reduced in float32.

    Returns:
        This rank's rows of every parameter, trained or not, in the order of `model.named_parameters()`.
    """
    policy = MixedPrecisionPolicy()
    if bf16:
        # No unit casts what it is given: timesteps (a DiT's blocks take them) and the sines of Flux's positions do not
        # survive bfloat16. `step` casts the images itself, and from there on models do as they do in bfloat16.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    keep = False if topology.shard_size == 1 else None  # nothing to gather again, so nothing to free in between
    for unit in sharding_units(model):
        fully_shard(
            cast(list[torch.nn.Module], unit),
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=keep,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=keep)
    for unit in fsdp_modules(model):
        if topology.shard_size > 1:  # for one shard it is 1 anyway, and FSDP would go over all gradients to divide
            unit.set_gradient_divide_factor(1.0)  # the loss is already divided by the number of microbatches
        unit.set_force_sum_reduction_for_comms(True)
        if config.reduction == "invariant":
            reduction = InvariantReduction(topology, rounds)
            unit.set_custom_reduce_scatter(reduction)
            unit.set_all_reduce_hook(reduction.finish_round)
        elif topology.num_replicas > 1:
            unit.set_all_reduce_hook(functools.partial(_all_reduce, topology))
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    return _local_parameters(model, topology)


def gather_for_good(model: torch.nn.Module, parameters: list[LocalParameter]) -> list[LocalParameter]:
    """Have FSDP keep what it gathers, and train that; the memory that it was gathered from is given back. Local: for
    models of which every rank has all rows, in float32.

    From here on `reshard` would free the weights; and so would `state_dict`, which is refused.
    """
    for module in model.modules():
        module.register_state_dict_pre_hook(_refuse)  # before FSDP's, which comes with the first `unshard`
    for module in fsdp_modules(model):
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    gathered = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter in parameters:
        shard = cast(DTensor, parameter.parameter)._local_tensor  # `to_local` makes another tensor of the same memory
        memory = shard.untyped_storage()
        shard.set_(gathered[parameter.name])  # pyright: ignore[reportArgumentType]  # a tensor is as good
        memory.resize_(0)
    return [replace(p, local=gathered[p.name], computed_with=True) for p in parameters]


def _refuse(*_: object) -> None:
    raise AssertionError("state_dict() would free the weights of this model; take TrainState.tensors()")


def fsdp_modules(model: torch.nn.Module) -> list[FSDPModule]:
    """The units of a sharded model, and its root."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def weights_changed(model: torch.nn.Module, parameters: Sequence[LocalParameter]) -> None:
    """Call it when something but the optimizer has written to `local`: what FSDP has gathered before, and may keep for
    the next forward pass, is of the other weights. Local."""
    if not all(parameter.computed_with for parameter in parameters):
        for module in fsdp_modules(model):
            module.reshard()


def kept_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of `model` that belong into a checkpoint, by name; the others are constants of the class.

    What `state_dict` has of buffers, for models on which it may not be called.
    """
    constants = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in constants}


def _all_reduce(topology: Topology, grad: torch.Tensor) -> None:
    dist.all_reduce(grad, group=topology.replicate_group)


def _local_parameters(model: torch.nn.Module, topology: Topology) -> list[LocalParameter]:
    parameters = []
    for name, parameter in model.named_parameters():
        local = cast(DTensor, parameter.data).to_local()
        rows = -(-parameter.shape[0] // topology.shard_size)  # as torch.chunk cuts
        offset = min(rows * topology.shard, parameter.shape[0])
        assert len(local) == min(rows, parameter.shape[0] - offset), (name, local.shape, parameter.shape)
        parameters.append(
            LocalParameter(
                name=name,
                shape=tuple(parameter.shape),
                row_offset=offset,
                parameter=parameter,
                local=local,
            )
        )
    return parameters


def begin_round(
    model: torch.nn.Module, parameters: Sequence[LocalParameter], config: ParallelConfig, rounds: Rounds
) -> None:
    """Tell FSDP whether this round's gradients are reduced. `InvariantReduction` takes every round's, and adds them up
    itself: what FSDP has of the round before must not be added as well."""
    if config.reduction == "invariant":
        if rounds.current:
            drop_gradients(parameters)
    elif rounds.local:
        cast(FSDPModule, model).set_requires_gradient_sync(rounds.is_last)


def drop_gradients(parameters: Sequence[LocalParameter]) -> None:
    """Free the gradients of the local rows."""
    for parameter in parameters:
        parameter.parameter.grad = None


def gather_rows(local: torch.Tensor, parameter: LocalParameter, topology: Topology) -> torch.Tensor:
    """The whole of a tensor that is sharded like `parameter`. Collective: all ranks.

    Shapes: (rows, ...) on each rank -> parameter.shape on all.
    """
    rows = -(-parameter.shape[0] // topology.shard_size)
    padded = local.new_zeros(rows, *parameter.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(topology.shard_size)]
    dist.all_gather(parts, padded, group=topology.shard_group)
    return torch.cat(parts)[: parameter.shape[0]]
