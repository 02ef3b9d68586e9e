"""How much memory a training process will take, counted on a model without memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from trainers.conditioning import ConditioningConfig, call_model, takes_text, type_name
from trainers.config import TrainerConfig
from trainers.data.samples import Source
from trainers.fitting import blank_condition, check_fits, data_shape
from trainers.models import empty_model
from trainers.optimizers import OptimizerConfig, make_optimizer
from trainers.parallel import LocalParameter
from trainers.pretrained import PretrainedFolder
from trainers.reduction import Rounds
from trainers.text_encoder import encoder_facts
from trainers.tree import aligned_heights
from trainers.units import sharding_units
from trainers.whole_tensor_optimizers import hidden_matrices

_TEXT_TOKENS = {"SD3Transformer2DModel": 77 + 256, "FluxTransformer2DModel": 512, "PixArtTransformer2DModel": 120}
_CLIP_TOKENS = 77
_TOKENS_OF_BERT = 512


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one rank takes, while it trains."""

    parameters: int
    """The float32 rows of the weights."""
    gathered: int
    """The largest two units, whole: the one that is computed and the one that is fetched ahead. Under ddp nothing, but
    in bfloat16 all."""
    gradients: int
    accumulation: int
    """Sums of gradients that are kept from one microbatch to the next, whole under `accumulation: local`."""
    optimizer: int
    """Its state: moments, and what else it keeps for every parameter."""
    ema: int
    """Every profile, also those that begin later."""
    frozen: int
    """VAE and text encoders, whole on every rank, by the tensors in their files."""
    activations: int | None
    """What autograd keeps of one microbatch; under gradient_checkpointing those of one block come on top while it is
    computed again. None: the model has an operation without a shape-only form."""

    @property
    def total(self) -> int:
        return sum(value or 0 for value in asdict(self).values())


def rank_memory(config: TrainerConfig, source: Source, world_size: int) -> RankMemory:
    """An estimate for each of `world_size` ranks. Local; needs no process group.

    Activations are the tensors that autograd saves in one forward pass on the meta device, each storage once, less the
    parameters. Kernels' workspaces, communication buffers and the allocator's waste come on top.

    Raises:
        ConfigError: the model cannot be trained on this data, by this optimizer, or by so many workers.
    """
    with torch.device("meta"):
        model = empty_model(config.model, config.seed)
    shape = check_fits(model, source, config) or data_shape(source, config)
    shards = config.parallel.shards(world_size)
    every, trained = (
        sum(_rows(p, shards) for p in model.parameters() if p.requires_grad or not only_trained)
        for only_trained in (False, True)
    )
    bf16 = config.train.precision == "bf16"
    width = 2 if bf16 else 4
    units = [unit for modules in sharding_units(model) for unit in modules]
    inside = {id(p) for unit in units for p in unit.parameters()}
    root = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    largest = sorted((root, *(sum(p.numel() for p in unit.parameters()) for unit in units)), reverse=True)
    folder = config.model.folder()
    return RankMemory(
        parameters=4 * every,
        gathered=width * (sum(largest[:2]) if shards > 1 else every if bf16 else 0),
        gradients=4 * trained,
        accumulation=4 * _kept_sums(config, model, world_size),
        optimizer=optimizer_bytes(model, config.optimizer, shards),
        ema=4 * trained * len(config.ema),
        frozen=_frozen_bytes(folder, config.conditioning),
        activations=_activation_bytes(model, config, shape),
    )


def largest_optimizer(model: nn.Module, config: OptimizerConfig, shards: int = 1) -> torch.optim.Optimizer:
    """That of the rank with the most rows, its state in place. Local; `model` may be without memory, then so is it.

    Raises:
        ConfigError: it cannot be made; see `make_optimizer`.
    """
    parameters = [
        LocalParameter(
            name=name,
            shape=tuple(parameter.shape),
            row_offset=0,
            parameter=parameter,
            local=parameter.detach()[: -(-len(parameter) // shards)] if parameter.ndim else parameter.detach(),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return make_optimizer(parameters, config, hidden_matrices(model))


def optimizer_bytes(model: nn.Module, config: OptimizerConfig, shards: int = 1) -> int:
    """What `largest_optimizer` keeps; raises as it does."""
    optimizer = largest_optimizer(model, config, shards)
    kept = (slot[name] for slot in optimizer.state.values() for name in config.moments if name in slot)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _kept_sums(config: TrainerConfig, model: nn.Module, world_size: int) -> int:
    """The most elements that a rank holds between two microbatches, beside its shard of the gradient."""
    parallel, trained = config.parallel, [p for p in model.parameters() if p.requires_grad]
    whole = sum(p.numel() for p in trained)
    rounds = Rounds(config.train.num_microbatches, world_size, local=parallel.accumulation == "local")
    if parallel.reduction == "fast":
        return whole if rounds.local and rounds.count > 1 else 0
    if rounds.local:
        firsts = (rank * rounds.count for rank in range(world_size))
        return whole * max(len(aligned_heights(first, first + k)) for first in firsts for k in range(rounds.count))
    shards = parallel.shards(world_size)
    slice_size = -(-sum(_rows(p, shards) for p in trained) * shards // world_size)
    done = (min(k * world_size, rounds.num_microbatches) for k in range(rounds.count))
    return slice_size * max(len(aligned_heights(0, stop)) for stop in done)


def _rows(parameter: nn.Parameter, shards: int) -> int:
    """Elements of the largest shard."""
    if not parameter.ndim:
        return 1
    return -(-parameter.shape[0] // shards) * (parameter.numel() // max(1, parameter.shape[0]))


def _frozen_bytes(folder: PretrainedFolder | None, config: ConditioningConfig) -> int:
    width = 4 if config.precision == "fp32" else 2
    if config.text_encoder is not None:
        return width * encoder_facts(config)[1]
    if folder is None or not folder.index:
        return 0
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    return sum(width * folder.num_elements(name) for name in parts if folder.has(name))


def _activation_bytes(model: nn.Module, config: TrainerConfig, shape: tuple[int, int, int]) -> int | None:
    batch = config.train.microbatch_size
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tokens = _TEXT_TOKENS.get(type_name(model), _CLIP_TOKENS) if takes_text(model) else 1
    if config.conditioning.text_encoder is not None:
        tokens = config.conditioning.max_tokens or _TOKENS_OF_BERT
    elif takes_text(model) and config.conditioning.max_tokens is not None and type_name(model) in _TEXT_TOKENS:
        tokens = config.conditioning.max_tokens + (_CLIP_TOKENS if type_name(model).startswith("SD3") else 0)
    model = model.to(dtype)
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}  # the storages stay alive here: an id may not come twice
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    device = torch.device("meta")
    condition = blank_condition(model, batch, tokens, device).cast(dtype)
    noisy = torch.zeros((batch, *shape), device=device, dtype=dtype)
    timesteps = torch.zeros(batch, dtype=torch.long, device=device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call_model(model.train(), noisy, timesteps, condition)
    except NotImplementedError:
        return None
    return sum(size for _, size in kept.values())
