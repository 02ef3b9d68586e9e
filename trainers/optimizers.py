"""Optimizers: torch's elementwise ones, so that sharding can not change a bit.

What looks at more than one element at a time (Adafactor, Muon, Prodigy, 8-bit blocks) would see other elements at
another world size, and is therefore not offered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trainers.errors import ConfigError
from trainers.fused_adam import FusedAdam
from trainers.parallel import LocalParameter


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Settings of some parameters that differ from the others'."""

    match: str
    """Regular expression, searched in the parameter's name; of several groups that match, the first counts."""
    lr_scale: float = 1.0
    """Their learning rate, as a multiple of the run's, >= 0."""
    weight_decay: float | None = None
    """Their weight decay, >= 0; null: as without the group."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ConfigError(f"match={self.match} is no regular expression: {error}; correct it") from None
        for key in ("lr_scale", "weight_decay"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ConfigError(f"{key}={value} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and gradient clipping."""

    name: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    """adamw (Loshchilov and Hutter, 2019), adam (Kingma and Ba, 2015), sgd or rmsprop: torch's, all elementwise."""
    lr: float = 1e-4
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment of adamw and adam, 0 <= beta < 1."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0; not for sgd."""
    weight_decay: float = 0.0
    """Weight decay, >= 0: decoupled in adamw, added to the gradient in the others."""
    decay_exclude: Literal["none", "norms_and_biases"] = "none"
    """norms_and_biases: no weight decay for parameters of fewer than two dimensions."""
    momentum: float = 0.0
    """Momentum of sgd and rmsprop, 0 <= momentum < 1."""
    nesterov: bool = False
    """Nesterov momentum of sgd."""
    alpha: float = 0.99
    """Decay of rmsprop's second moment, 0 <= alpha < 1."""
    centered: bool = False
    """rmsprop: divide by the standard deviation of the gradient instead of its root mean square."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with a learning rate or weight decay of their own."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm, > 0; null: never."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "clip_norm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"{key}={value} must be above 0")
        for key, values in {"betas": self.betas, "momentum": (self.momentum,), "alpha": (self.alpha,)}.items():
            if not all(0 <= value < 1 for value in values):
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 0 and below 1")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay={self.weight_decay} must be at least 0")
        for key, (names, default) in _ONLY_FOR.items():
            if getattr(self, key) != default and self.name not in names:
                raise ConfigError(
                    f"{key}={getattr(self, key)} has no effect on name={self.name}; it is for {' and '.join(names)}"
                )
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov=true needs momentum above 0; 0.9 is usual")
        if self.decay_exclude != "none" and not self._decays():
            raise ConfigError(f"decay_exclude={self.decay_exclude} has no effect without weight_decay; set it above 0")

    def _decays(self) -> bool:
        return bool(self.weight_decay or any(group.weight_decay for group in self.groups))

    @property
    def moments(self) -> tuple[str, ...]:
        """torch's names of the tensors that are kept for every parameter."""
        if self.name in ("adamw", "adam"):
            return ("exp_avg", "exp_avg_sq")
        momentum = ("momentum_buffer",) if self.momentum else ()
        if self.name == "sgd":
            return momentum
        return ("square_avg", *momentum, *(("grad_avg",) if self.centered else ()))


_ONLY_FOR: dict[str, tuple[tuple[str, ...], Any]] = {
    "betas": (("adamw", "adam"), (0.9, 0.999)),
    "eps": (("adamw", "adam", "rmsprop"), 1e-8),
    "momentum": (("sgd", "rmsprop"), 0.0),
    "nesterov": (("sgd",), False),
    "alpha": (("rmsprop",), 0.99),
    "centered": (("rmsprop",), False),
}
"""Key -> the optimizers it is for, and its default."""


def make_optimizer(parameters: Sequence[LocalParameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the local rows, with its moments in place so that a checkpoint can be read into them. Local.

    Every group has a `lr_scale`; the first one also holds `num_updates`, which decides the bias correction.

    Raises:
        ConfigError: a group matches no parameter.
    """
    groups = [
        # A rank can be without any row (more ranks than rows); torch wants at least one tensor.
        {"params": [p.local for p in members if p.local.numel()] or [torch.zeros(0)], **settings}
        for members, settings in _grouped(parameters, config)
    ]
    optimizer = _construct(groups, config)
    for parameter in parameters:
        if parameter.local.numel():
            moments = {name: torch.zeros_like(parameter.local) for name in config.moments}
            optimizer.state[parameter.local] = {"step": torch.tensor(0.0), **moments}
    optimizer.param_groups[0]["num_updates"] = 0
    return optimizer


def _construct(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    # A CPU has no launches to save, but caches: parameter by parameter what one operation leaves there is what the next
    # one needs, and with all operations in one pass it is read once.
    on_cpu = all(tensor.is_cpu for group in groups for tensor in group["params"])
    if on_cpu and config.name in ("adamw", "adam"):
        return FusedAdam(groups, decoupled=config.name == "adamw", lr=config.lr, betas=config.betas, eps=config.eps)
    common: dict[str, Any] = {"lr": config.lr, "foreach": not on_cpu}
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, **common)
        case "adam":
            return torch.optim.Adam(groups, betas=config.betas, eps=config.eps, **common)
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
        case "rmsprop":
            return torch.optim.RMSprop(
                groups, alpha=config.alpha, eps=config.eps, momentum=config.momentum, centered=config.centered, **common
            )


def _grouped(
    parameters: Sequence[LocalParameter], config: OptimizerConfig
) -> list[tuple[list[LocalParameter], dict[str, float]]]:
    """Parameters with the same settings together, in the order in which the settings first occur."""
    matched: set[str] = set()
    groups: dict[tuple[float, float], list[LocalParameter]] = {}
    for parameter in parameters:
        group = next((group for group in config.groups if re.search(group.match, parameter.name)), None)
        lr_scale, decay = 1.0, config.weight_decay
        if group is not None:
            matched.add(group.match)
            lr_scale = group.lr_scale
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        if config.decay_exclude == "norms_and_biases" and len(parameter.shape) < 2:
            decay = 0.0
        groups.setdefault((lr_scale, decay), []).append(parameter)
    for index, group in enumerate(config.groups):
        if group.match not in matched:
            raise ConfigError(
                f"optimizer.groups[{index}].match={group.match} matches no parameter that an earlier group leaves, of"
                f" {parameters[0].name}, {parameters[-1].name}, ...; correct or remove it"
            )
    return [(members, {"lr_scale": scale, "weight_decay": decay}) for (scale, decay), members in groups.items()]
