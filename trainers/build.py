"""From a config to everything that a training process needs."""

from __future__ import annotations

import torch

from trainers.config import TrainerConfig
from trainers.data.sources import open_source
from trainers.ema import EMA
from trainers.errors import ConfigError
from trainers.fitting import check_fits
from trainers.frozen import open_frozen
from trainers.generators import GeneratorStates
from trainers.initial_weights import load_initial_weights
from trainers.models import empty_model, null_label
from trainers.norm import StepSums
from trainers.objectives import Objective
from trainers.optimizers import make_optimizer
from trainers.parallel import LocalParameter, make_topology, shard_model
from trainers.progress import Progress
from trainers.reduction import Rounds, Topology
from trainers.state import TrainState, combined_fingerprint, sharded_fingerprints, sharded_tensor
from trainers.step import Task


def build(config: TrainerConfig, device: torch.device) -> tuple[TrainState, Task]:
    """A fresh state at step 0, and the task it is trained on. Collective: all ranks of the default process group.

    Raises:
        ConfigError: the model, data or strategy cannot be built from this configuration.
    """
    topology, mesh = make_topology(config.parallel, device)
    if topology.world_size > config.train.num_microbatches:
        raise ConfigError(
            f"{topology.world_size} workers cannot share train.global_batch_size={config.train.global_batch_size} /"
            f" train.microbatch_size={config.train.microbatch_size} = {config.train.num_microbatches} microbatches;"
            f" use fewer workers or a smaller microbatch_size"
        )
    source = open_source(config.data)
    model = empty_model(config.model, config.seed)
    latent_shape = check_fits(model, source, config)
    frozen = open_frozen(config.model, config.conditioning, device)
    rounds = Rounds(config.train.num_microbatches, topology.world_size, local=config.parallel.accumulation == "local")
    whole = shard_model(model, config.parallel, topology, mesh, rounds, config.train.precision == "bf16")
    load_initial_weights(config.model, config.seed, model, whole)
    parameters = [parameter for parameter in whole if parameter.parameter.requires_grad]
    state = TrainState(
        model=model,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.optimizer),
        moments=config.optimizer.moments,
        ema=EMA(config.ema, {p.name: p.local for p in parameters}, config.train.global_batch_size),
        generators=GeneratorStates(),
        topology=topology,
        progress=Progress(),
        frozen=_hash_of_untrained(whole, topology) | (frozen.hashes if frozen else {}),
    )
    task = Task(
        config=config,
        source=source,
        objective=Objective(config.objective),
        rounds=rounds,
        sums=StepSums(parameters, topology, device),
        device=device,
        null_label=null_label(model),
        frozen=frozen,
        latent_shape=latent_shape,
    )
    return state, task


def _hash_of_untrained(parameters: list[LocalParameter], topology: Topology) -> dict[str, str]:
    """The hash of the network's own frozen parameters, if it has any. Collective: all ranks."""
    untrained = [p for p in parameters if not p.parameter.requires_grad]
    if not untrained:
        return {}
    tensors = (sharded_tensor(p.name, p, p.local, topology) for p in untrained)
    return {"network": combined_fingerprint(sharded_fingerprints(tensors))}
