"""The state of a run: everything that may influence the next step, as named tensors and a few scalars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from trainers.divergence import DivergenceGuard
from trainers.ema import EMA
from trainers.errors import StateMismatchError
from trainers.exclusions import Exclusions
from trainers.fingerprint import format_fingerprint, partial_fingerprint
from trainers.generators import GeneratorStates
from trainers.identity import check_hashes
from trainers.parallel import LocalParameter, kept_buffers
from trainers.progress import Progress
from trainers.reduction import Topology
from trainers.shards import TensorSpec
from trainers.steadiness import Steady

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class LocalTensor:
    """The rows of one tensor of the state that live on this rank."""

    spec: TensorSpec
    row_offset: int
    tensor: torch.Tensor
    """(rows, ...), the live memory: reading it is a snapshot, writing it is a restore."""
    replica: int
    num_replicas: int
    """The same rows live on `num_replicas` ranks, of which this is number `replica`."""

    def owned_rows(self) -> tuple[int, int]:
        """The local rows `start, stop` that this replica writes, so that every row is written exactly once."""
        rows = len(self.tensor) if self.tensor.ndim else 1
        return rows * self.replica // self.num_replicas, rows * (self.replica + 1) // self.num_replicas


@dataclass(kw_only=True)
class TrainState:
    """The whole state of a run, as far as this rank holds it."""

    model: torch.nn.Module
    parameters: list[LocalParameter]
    """Those that are trained. The others follow from the configuration, and are no part of the state."""
    optimizer: torch.optim.Optimizer
    """Over the local rows, in the order of `parameters`; parameters with no local rows are left out."""
    moments: tuple[str, ...]
    """Names of the tensors that the optimizer keeps for parameters."""
    ema: EMA
    generators: GeneratorStates = field(default_factory=GeneratorStates)
    divergence: DivergenceGuard
    exclusions: Exclusions = field(default_factory=Exclusions)
    topology: Topology
    progress: Progress = field(default_factory=Progress)
    numbers: tuple[str, ...] = ()
    """Names of the numbers that the optimizer keeps for all parameters together, in each of its groups."""
    frozen: Mapping[str, str] = field(default_factory=dict)
    """Part -> hash, of all that the training needs but does not change: text encoders, VAE, weights under adapters."""
    _steady: Steady[tuple[bool, ...]] = field(default_factory=Steady, init=False, repr=False)

    def take_gradients(self) -> None:
        """Hand the gradient of every parameter to the optimizer. Local.

        Raises:
            ConfigError: a parameter has one in some steps only. The optimizer would count that one's updates apart,
                and a checkpoint has one count for all.
        """
        for parameter in self.parameters:
            parameter.local.grad = parameter.local_grad()
        self._steady.check(tuple(parameter.local.grad is not None for parameter in self.parameters))

    def tensors(self) -> Iterator[LocalTensor]:
        """Every tensor of the state, in an order that is the same on all ranks. Local."""
        for parameter in self.parameters:
            yield self._sharded("model", parameter, parameter.local)
        for moment in self.moments:
            yield from self._of_optimizer(moment)
        averages = self.ema.tensors()
        for profile in sorted(averages):
            for parameter in self.parameters:
                yield self._sharded(f"ema/{profile}", parameter, averages[profile][parameter.name])
        for name, value in kept_buffers(self.model).items():
            yield self._replicated(f"model/{name}", value)
        for name, value in self.generators.tensors.items():
            yield self._replicated(f"rng/{name}", value)

    def _of_optimizer(self, moment: str) -> Iterator[LocalTensor]:
        for parameter in self.parameters:
            # A rank without rows has no optimizer state; it still takes part, with an empty tensor.
            slot = self.optimizer.state.get(parameter.local) or {moment: parameter.local}
            kept = slot.get(moment)
            if kept is None:
                continue  # Adafactor keeps something else of a vector than of a matrix, Muon of what is not its own
            if kept.shape == parameter.local.shape:
                yield self._sharded(f"optimizer/{moment}", parameter, kept)
            else:  # of an optimizer that looks at whole tensors, which all ranks hold
                yield self._replicated(f"optimizer/{moment}/{parameter.name}", kept)

    def scalars(self) -> dict[str, Any]:
        """What is not a tensor, JSON-ready and the same on all ranks."""
        scalars = {
            "optimizer_steps": self.optimizer_steps,
            "ema": self.ema.scalars(),
            "divergence": self.divergence.scalars(),
            "exclusions": self.exclusions.scalars(),
        }
        if self.numbers:
            scalars["optimizer"] = {name: self.optimizer.param_groups[0][name] for name in self.numbers}
        return {**scalars, "frozen": dict(self.frozen)} if self.frozen else scalars

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """The counterpart of `scalars`; EMA profiles that had begun get their memory here. Local.

        What is left out of the data adds to what this state leaves out already.

        Raises:
            StateMismatchError: a part is missing, or does not belong to this configuration.
            ConfigError: a frozen part is not the one that the run was trained with.
        """
        check_hashes(scalars.get("frozen", {}), self.frozen)
        try:
            steps = int(scalars["optimizer_steps"])
            numbers = {name: scalars["optimizer"][name] for name in self.numbers}
            self.ema.load_scalars(scalars["ema"])
            self.divergence.load_scalars(scalars["divergence"])
            self.exclusions = self.exclusions.merged(Exclusions.from_scalars(scalars["exclusions"]))
        except (KeyError, TypeError) as error:
            raise StateMismatchError(f"the checkpoint's scalars are incomplete: {error!r} in {scalars!r}") from error
        for slot in self.optimizer.state.values():
            if "step" in slot:  # in a tensor or as a number, as the library has it
                slot["step"] = torch.full_like(slot["step"], steps) if torch.is_tensor(slot["step"]) else steps
        for group in self.optimizer.param_groups:
            group.update(numbers)
        self.optimizer_steps = steps

    @property
    def optimizer_steps(self) -> int:
        """Updates that were made; Adam's bias correction depends on it."""
        return self.optimizer.param_groups[0]["num_updates"]

    @optimizer_steps.setter
    def optimizer_steps(self, value: int) -> None:
        self.optimizer.param_groups[0]["num_updates"] = value

    def _sharded(self, prefix: str, parameter: LocalParameter, tensor: torch.Tensor) -> LocalTensor:
        return sharded_tensor(f"{prefix}/{parameter.name}", parameter, tensor, self.topology)

    def _replicated(self, name: str, tensor: torch.Tensor) -> LocalTensor:
        return LocalTensor(
            spec=TensorSpec(name=name, dtype=SAFETENSORS_DTYPES[tensor.dtype], shape=tuple(tensor.shape)),
            row_offset=0,
            tensor=tensor,
            replica=self.topology.rank,
            num_replicas=self.topology.world_size,
        )


def sharded_tensor(name: str, parameter: LocalParameter, tensor: torch.Tensor, topology: Topology) -> LocalTensor:
    """`tensor`, which lies over the ranks as `parameter` does, under `name`."""
    return LocalTensor(
        spec=TensorSpec(name=name, dtype=SAFETENSORS_DTYPES[tensor.dtype], shape=parameter.shape),
        row_offset=parameter.row_offset,
        tensor=tensor,
        replica=topology.replica,
        num_replicas=topology.num_replicas,
    )


def fingerprints(state: TrainState) -> dict[str, int]:
    """The fingerprint of every tensor of the state (see `trainers.fingerprint`), whatever its sharding.

    Collective: all ranks; each hashes the rows that it owns, and one small all-reduce adds the hashes up.
    """
    return sharded_fingerprints(state.tensors())


def sharded_fingerprints(tensors: Iterable[LocalTensor]) -> dict[str, int]:
    """The fingerprint of every one of the `tensors`. Collective: all ranks, with their parts of the same tensors."""
    names, partials, device = [], [], None
    for local in tensors:
        start, stop = local.owned_rows()
        names.append(local.spec.name)
        device = device or local.tensor.device
        rows = local.tensor.detach().reshape(-1) if not local.tensor.ndim else local.tensor.detach()[start:stop]
        data = rows.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        owned = stop > start and local.tensor.numel() > 0
        partial = partial_fingerprint(local.spec, local.row_offset + start, data) if owned else 0
        partials.append(partial - (1 << 64) if partial >= 1 << 63 else partial)  # as the bits of an int64
    sums = torch.tensor(partials, dtype=torch.int64, device=device)
    dist.all_reduce(sums)  # wraps around: addition modulo 2**64
    return {name: value % (1 << 64) for name, value in zip(names, sums.tolist(), strict=True)}


def combined_fingerprint(tensors: Mapping[str, int]) -> str:
    """One word for a whole state: XXH3-128 of the lines `name fingerprint`, sorted by name."""
    lines = (f"{name} {format_fingerprint(value)}\n" for name, value in sorted(tensors.items()))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())
