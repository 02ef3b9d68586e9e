"""From a config to everything that a training process needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from trainers.allocation import keep_freed_memory
from trainers.compilation import compile_blocks
from trainers.config import TrainerConfig
from trainers.data.batch import Batch
from trainers.data.files import FilesAt, local_files
from trainers.data.guarded import GuardedSource
from trainers.data.loader import ReadAhead
from trainers.data.samples import Source
from trainers.data.sources import open_source
from trainers.determinism import use_deterministic_kernels
from trainers.divergence import DivergenceGuard
from trainers.ema import EMA
from trainers.errors import ConfigError
from trainers.evaluation.metrics import open_networks
from trainers.evaluation.split import split
from trainers.fitting import check_fits
from trainers.frozen import Frozen, open_frozen
from trainers.identity import agreed, check_encoders
from trainers.initial_weights import load_initial_weights
from trainers.integrity import ReplicaCheck
from trainers.models import empty_model, null_label
from trainers.norm import StepSums
from trainers.objectives import Objective
from trainers.optimizers import make_optimizer
from trainers.parallel import LocalParameter, gather_for_good, make_topology, shard_model
from trainers.recomputation import Recomputation
from trainers.reduction import Rounds, Topology
from trainers.replicated import reduce_directly
from trainers.state import TrainState, combined_fingerprint, sharded_fingerprints, sharded_tensor
from trainers.step import Task
from trainers.trace import StepTrace
from trainers.whole_tensor_optimizers import hidden_matrices


def build(
    config: TrainerConfig, device: torch.device, trace: StepTrace | None = None, files_at: FilesAt = local_files
) -> tuple[TrainState, Task]:
    """A fresh state at step 0, and the task it is trained on. Collective: all ranks of the default process group.

    Args:
        trace: where this rank writes down what it does; None: where nobody reads it.
        files_at: opens `data.path`; the default reads local paths only.

    Raises:
        ConfigError: the model, data or strategy cannot be built from this configuration.
    """
    _prepare(device)
    topology, mesh = make_topology(config.parallel, device)
    trace = trace or StepTrace(config.train.microbatch_size)
    rounds = _rounds(config, topology.world_size, trace)
    source = open_source(config.data, files_at)
    model = empty_model(config.model, config.seed)
    latent_shape = check_fits(model, source, config)
    frozen = open_frozen(config.model, config.conditioning, device)
    whole = _shard(config, model, topology, mesh, rounds)
    parameters = [parameter for parameter in whole if parameter.parameter.requires_grad]
    state = TrainState(
        model=model,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.optimizer, hidden_matrices(model)),
        moments=config.optimizer.moments,
        numbers=config.optimizer.numbers,
        ema=EMA(config.ema, {p.name: p.local for p in parameters}, config.train.global_batch_size),
        divergence=DivergenceGuard(config.divergence),
        topology=topology,
        frozen=agreed(_hash_of_untrained(whole, topology) | _unchanging(config, frozen, source)),
    )
    trained_on, validation = _parts(config, source, trace)
    task = Task(
        config=config,
        source=trained_on,
        validation=validation,
        trace=trace,
        objective=Objective(config.objective),
        rounds=rounds,
        sums=StepSums(parameters, topology, device),
        replicas=ReplicaCheck(config.integrity),
        recomputation=Recomputation(config.integrity, rounds, device),
        device=device,
        null_label=null_label(model),
        frozen=frozen,
        latent_shape=latent_shape,
    )
    return state, _with_threads(_with_networks(task), state)


def _prepare(device: torch.device) -> None:
    use_deterministic_kernels(device)
    if device.type == "cpu":
        keep_freed_memory()


def _shard(
    config: TrainerConfig, model: torch.nn.Module, topology: Topology, mesh: DeviceMesh, rounds: Rounds
) -> list[LocalParameter]:
    """This rank's rows of every parameter, with the weights that the run begins at. Collective: all ranks."""
    if config.model.compile:
        compile_blocks(model, torch.device(mesh.device_type))
    bf16 = config.train.precision == "bf16"
    whole = shard_model(model, config.parallel, topology, mesh, rounds, bf16)
    load_initial_weights(config.model, config.seed, model, whole)
    if topology.shard_size > 1 or bf16:
        return whole
    whole = gather_for_good(model, whole)
    # On a GPU the host is ahead of the device, and FSDP's streams have their use.
    directly = mesh.device_type == "cpu" and config.parallel.reduction == "invariant"
    return reduce_directly(model, whole, topology, rounds) if directly else whole


def _parts(config: TrainerConfig, source: Source, trace: StepTrace) -> tuple[GuardedSource, GuardedSource | None]:
    """What is trained on, and what is held out, if anything is."""
    trained_on, held_out = split(config.validation, config.seed, len(source))
    skip = config.data.on_broken == "skip"
    validation = None if held_out is None else GuardedSource(source, trace, held_out, skip_broken=skip)
    return GuardedSource(source, trace, trained_on, skip_broken=skip), validation


def _with_networks(task: Task) -> Task:
    """The task, with what drawn images are measured by if the validation asks for it."""
    metrics = task.config.validation.metrics
    return task if metrics is None else replace(task, networks=open_networks(metrics, task.device))


def _with_threads(task: Task, state: TrainState) -> Task:
    """The task, with microbatches read ahead if the data asks for it."""
    data = task.config.data
    if not data.num_workers:
        return task

    def read(step: int, microbatch: int) -> Batch:
        return task.load(task.source.untraced(state.exclusions.left_out(step)), step, microbatch)

    return replace(task, read_ahead=ReadAhead(read, data.num_workers, data.prefetch))


def _unchanging(config: TrainerConfig, frozen: Frozen | None, source: Source) -> dict[str, str]:
    """The hash of frozen parts and data. Raises ConfigError if the data was made with other parts."""
    hashes = frozen.hashes if frozen else {}
    if source.latents is not None:
        check_encoders(source.latents.encoders, hashes, str(config.data.path))
    return hashes | ({"data": source.identity} if source.identity else {})


def _rounds(config: TrainerConfig, world_size: int, trace: StepTrace) -> Rounds:
    """Who works on which microbatch; the trace has it too. Raises ConfigError if a rank would never have any."""
    if world_size > config.train.num_microbatches:
        raise ConfigError(
            f"{world_size} workers cannot share train.global_batch_size={config.train.global_batch_size} /"
            f" train.microbatch_size={config.train.microbatch_size} = {config.train.num_microbatches} microbatches;"
            f" use fewer workers or a smaller microbatch_size"
        )
    rounds = Rounds(config.train.num_microbatches, world_size, local=config.parallel.accumulation == "local")
    trace.ranks = tuple(map(rounds.rank_of, range(rounds.num_microbatches)))
    return rounds


def _hash_of_untrained(parameters: list[LocalParameter], topology: Topology) -> dict[str, str]:
    """The hash of the network's own frozen parameters, if it has any. Collective: all ranks."""
    untrained = [p for p in parameters if not p.parameter.requires_grad]
    if not untrained:
        return {}
    tensors = (sharded_tensor(p.name, p, p.local, topology) for p in untrained)
    return {"network": combined_fingerprint(sharded_fingerprints(tensors))}
