"""Optimizers that look at whole tensors: Muon, Adafactor, Prodigy and 8-bit AdamW.

What they do to one element depends on others of its tensor (a norm, a row's mean, the largest of a block). So they are
for strategies under which every rank holds every tensor whole: there all ranks make the same update of the same
gradients, and the number of workers decides nothing. A strategy that cuts tensors is refused, whatever the number of
workers: it may grow.

Each is the optimizer of torch or of its own package, with the state in place from the start, so that a checkpoint can
be read into it. `groups` are those of `trainers.optimizers`, over local tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from trainers.errors import ConfigError
from trainers.units import sharding_units

WHOLE_TENSOR_STATE: dict[str, tuple[str, ...]] = {
    "muon": ("momentum_buffer", "exp_avg", "exp_avg_sq"),
    "adafactor": ("row_var", "col_var", "variance"),
    "prodigy": ("exp_avg", "exp_avg_sq", "s", "p0"),
    "adamw8bit": ("state1", "absmax1", "state2", "absmax2"),
}
"""Name of the optimizer -> what its tensors are called; not every parameter has all of them."""

WHOLE_MODEL_STATE = {"prodigy": ("d", "d_max", "d_numerator", "k")}
"""Name of the optimizer -> numbers that it keeps for all parameters together, as settings of its groups."""

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the weights of linear layers and convolutions inside the model's blocks, AdamW for all else.

    So first and last layers, embeddings, norms and biases go to AdamW, with the `betas` and `eps` of the section above.
    A convolution's kernel counts as a matrix of (out, in * height * width).
    """

    momentum: float = 0.95
    """Decay of the averaged gradient, 0 <= momentum < 1."""
    nesterov: bool = True
    """Nesterov momentum."""
    ns_steps: int = 5
    """Newton-Schulz iterations that make the update orthogonal, 1 <= n < 100."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Of an (m, n) matrix the learning rate is multiplied by, match_rms_adamw: 0.2 sqrt(max(m, n)), so that updates are
    as large as AdamW's (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4), original: sqrt(max(1, m / n)).
    """
    adamw_lr: float | None = None
    """Peak learning rate of AdamW's part, > 0; null: optimizer.lr, which goes with match_rms_adamw only."""
    exclude: str | None = None
    """Regular expression: parameters whose name it is found in go to AdamW too; null: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must be at least 0 and below 1")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov=true needs momentum above 0; 0.95 is usual")
        if not 1 <= self.ns_steps < 100:
            raise ConfigError(f"ns_steps={self.ns_steps} must be at least 1 and below 100; 5 is usual")
        if self.adamw_lr is not None and not self.adamw_lr > 0:
            raise ConfigError(f"adamw_lr={self.adamw_lr} must be above 0, or null for optimizer.lr")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ConfigError(f"exclude={self.exclude} is no regular expression: {error}; correct it") from None
        if self.adamw_lr is None and self.adjust_lr == "original":
            raise ConfigError(
                "adamw_lr=null does not go with adjust_lr=original, whose learning rates are far above AdamW's; give"
                " it, 3e-4 is usual"
            )


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """Adafactor as torch has it: the second moment of the last two dimensions as a column times a row.

    `lr` is the largest relative step: one step changes a tensor by its root mean square * min(lr, 1 / sqrt(step)).
    """

    beta2_decay: float = -0.8
    """The second moment's decay in step t is 1 - t^beta2_decay, < 0."""
    d: float = 1.0
    """An update whose root mean square is larger is scaled down to it, >= 1."""
    min_rms: float = 1e-3
    """Tensors whose root mean square is smaller are changed as if it were this, > 0."""

    def __post_init__(self) -> None:
        if not self.beta2_decay < 0:
            raise ConfigError(f"beta2_decay={self.beta2_decay} must be below 0; -0.8 is usual")
        if not self.d >= 1:
            raise ConfigError(f"d={self.d} must be at least 1")
        if not self.min_rms > 0:
            raise ConfigError(f"min_rms={self.min_rms} must be above 0; 0.001 is usual")


@dataclass(frozen=True, kw_only=True)
class ProdigyConfig:
    """Prodigy finds the step size by itself: `lr` is a factor of it, and 1 is usual. Weight decay is decoupled."""

    d_coef: float = 1.0
    """Factor of the estimate of d, the step size, > 0: what to tune first."""
    growth_rate: float | None = None
    """The most that d is multiplied by in one step, > 1; null: anything."""
    use_bias_correction: bool = False
    """Adam's bias correction."""
    safeguard_warmup: bool = False
    """Leave the learning rate out of the estimate's denominator: for schedules with a warm-up."""
    slice_p: int = 1
    """Estimate d from every slice_p-th element, >= 1: less memory; 11 is usual for that."""

    def __post_init__(self) -> None:
        if not self.d_coef > 0:
            raise ConfigError(f"d_coef={self.d_coef} must be above 0; 1 is usual")
        if self.growth_rate is not None and not self.growth_rate > 1:
            raise ConfigError(f"growth_rate={self.growth_rate} must be above 1, or null for no limit")
        if self.slice_p < 1:
            raise ConfigError(f"slice_p={self.slice_p} must be at least 1, which takes every element")


def hidden_matrices(model: nn.Module) -> frozenset[str]:
    """The names of Muon's parameters: weights of linear layers and convolutions inside the blocks of `model`."""
    inside = {id(layer) for unit in sharding_units(model) for block in unit for layer in block.modules()}
    return frozenset(
        f"{name}.weight"
        for name, layer in model.named_modules()
        if id(layer) in inside and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    )


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some parameters, AdamW for the others; groups and states of both in one.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; torch's implementation.
    """

    def __init__(self, groups: Groups, adamw: torch.optim.Optimizer, lr: float, config: MuonConfig) -> None:
        """Args: groups: Muon's, of tensors of two dimensions or more, contiguous; adamw: over all others."""
        tensors = list(_tensors(groups))
        self._matrices = {tensor: _matrix(tensor) for tensor in tensors}
        """Tensor -> the same memory in two dimensions, as torch's Muon wants it."""
        self._muon = torch.optim.Muon(
            [{**group, "params": [self._matrices[tensor] for tensor in group["params"]]} for group in groups],
            lr=lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr,
        )
        self._adamw = adamw
        super().__init__([*self._muon.param_groups, *adamw.param_groups], {})  # the same dicts, so `lr` is set in both
        self.state.update(adamw.state)
        for tensor, matrix in self._matrices.items():
            self.state[tensor] = {"momentum_buffer": torch.zeros_like(tensor)}
            self._muon.state[matrix] = {"momentum_buffer": _matrix(self.state[tensor]["momentum_buffer"])}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient. Local."""
        assert closure is None, "the gradients are there before"
        for tensor, matrix in self._matrices.items():
            matrix.grad = None if tensor.grad is None else _matrix(tensor.grad)
        self._muon.step()
        self._adamw.step()
        for matrix in self._matrices.values():
            matrix.grad = None


def make_adafactor(groups: Groups, lr: float, config: AdafactorConfig) -> torch.optim.Optimizer:
    """Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018; torch's."""
    eps = (None, config.min_rms)
    optimizer = torch.optim.Adafactor(groups, lr=lr, beta2_decay=config.beta2_decay, eps=eps, d=config.d)
    for tensor in _tensors(groups):
        slot = {"step": torch.tensor(0.0)}
        if tensor.ndim > 1:
            slot["row_var"] = tensor.new_zeros(*tensor.shape[:-1], 1)
            slot["col_var"] = tensor.new_zeros(*tensor.shape[:-2], 1, tensor.shape[-1])
        else:
            slot["variance"] = torch.zeros_like(tensor)
        optimizer.state[tensor] = slot
    return optimizer


def make_prodigy(groups: Groups, config: ProdigyConfig, **common: Any) -> torch.optim.Optimizer:
    """Source: Mishchenko and Defazio, "Prodigy: an expeditiously adaptive parameter-free learner", 2023.

    The tensors must hold the weights that the run begins at: how far they have moved since decides the step size.
    """
    try:
        import prodigyopt  # an optional package
    except ImportError as error:
        raise ConfigError("optimizer.name=prodigy needs prodigyopt; run: pip install prodigyopt") from error
    settings = {**asdict(config), "growth_rate": config.growth_rate or float("inf")}
    optimizer = prodigyopt.Prodigy(groups, **common, **settings)
    for tensor in _tensors(groups):
        taken = tensor.flatten()[:: config.slice_p]
        optimizer.state[tensor] = {
            "step": 0,
            "s": torch.zeros_like(taken),
            "p0": taken.clone(),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }
    return optimizer


def make_adamw8bit(groups: Groups, **common: Any) -> torch.optim.Optimizer:
    """Source: Dettmers et al., "8-bit optimizers via block-wise quantization", 2022.

    Moments of 4096 elements and more are kept in 8 bits, with a float32 a block of 256; smaller ones in float32.
    """
    try:
        import bitsandbytes  # an optional package # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("optimizer.name=adamw8bit needs bitsandbytes; run: pip install bitsandbytes") from error
    optimizer = bitsandbytes.optim.AdamW8bit(groups, **common)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, tensor in enumerate(group["params"]):
            optimizer.init_state(group, tensor, group_index, index)
    return optimizer


def _tensors(groups: Groups) -> Iterator[torch.Tensor]:
    for group in groups:
        yield from group["params"]


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(out, ...) -> (out, the rest), the same memory."""
    return tensor.view(len(tensor), -1)
