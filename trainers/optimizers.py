"""Optimizers: torch's elementwise ones, so that sharding can not change a bit, for every strategy.

What looks at more than one element at a time is in `trainers.whole_tensor_optimizers`, for ddp alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Literal

import torch

from trainers.errors import ConfigError
from trainers.fused_adam import FusedAdam
from trainers.parallel import LocalParameter, ParallelConfig
from trainers.whole_tensor_optimizers import (
    WHOLE_MODEL_STATE,
    WHOLE_TENSOR_STATE,
    AdafactorConfig,
    MuonAndAdamW,
    MuonConfig,
    ProdigyConfig,
    make_adafactor,
    make_adamw8bit,
    make_prodigy,
)


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

    name: Literal["adamw", "adam", "sgd", "rmsprop", "muon", "adafactor", "prodigy", "adamw8bit"] = "adamw"
    """adamw (Loshchilov and Hutter, 2019), adam (Kingma and Ba, 2015), sgd or rmsprop: torch's, all elementwise. muon
    (Jordan et al., 2024), adafactor (Shazeer and Stern, 2018), prodigy (Mishchenko and Defazio, 2023) and adamw8bit
    (Dettmers et al., 2022) look at whole tensors: with parallel.strategy ddp only."""
    lr: float = 1e-4
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment of adamw, adam, prodigy, adamw8bit and muon's AdamW, 0 <= beta < 1."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0; not for sgd and adafactor."""
    weight_decay: float = 0.0
    """Weight decay, >= 0: added to the gradient in adam, sgd and rmsprop, decoupled in the others."""
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
    muon: MuonConfig | None = None
    """More about muon; null: the defaults of that section."""
    adafactor: AdafactorConfig | None = None
    """More about adafactor; null: the defaults of that section."""
    prodigy: ProdigyConfig | None = None
    """More about prodigy; null: the defaults of that section."""

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
            value = getattr(self, key)
            if value != default and self.name not in names:
                shown = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                raise ConfigError(f"{key}={shown} has no effect on name={self.name}; it is for {' and '.join(names)}")
        if self.name == "prodigy":
            self._check_prodigy()
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov=true needs momentum above 0; 0.9 is usual")
        if self.decay_exclude != "none" and not self._decays():
            raise ConfigError(f"decay_exclude={self.decay_exclude} has no effect without weight_decay; set it above 0")

    def _check_prodigy(self) -> None:
        if self.lr < 0.01:
            raise ConfigError(
                f"lr={self.lr} is a factor of the step size that name=prodigy finds by itself; set it to 1"
            )
        for index, group in enumerate(self.groups):
            if group.lr_scale != 1:
                raise ConfigError(
                    f"groups[{index}].lr_scale={group.lr_scale} does not go with name=prodigy, which finds one step"
                    " size for all; remove it"
                )

    def check_strategy(self, parallel: ParallelConfig) -> None:
        """Raise ConfigError if the strategy cuts tensors that the optimizer has to see whole."""
        if self.name in WHOLE_TENSOR_STATE and parallel.cuts_tensors:
            raise ConfigError(
                f"parallel.strategy={parallel.strategy} cuts tensors, and optimizer.name={self.name} has to see them"
                " whole; set parallel.strategy=ddp, or take adamw, adam, sgd or rmsprop"
            )

    def _decays(self) -> bool:
        return bool(self.weight_decay or any(group.weight_decay for group in self.groups))

    @property
    def moments(self) -> tuple[str, ...]:
        """The library's names of the tensors that are kept for parameters; each has all, if the optimizer is
        elementwise."""
        if self.name in WHOLE_TENSOR_STATE:
            return WHOLE_TENSOR_STATE[self.name]
        if self.name in ("adamw", "adam"):
            return ("exp_avg", "exp_avg_sq")
        momentum = ("momentum_buffer",) if self.momentum else ()
        if self.name == "sgd":
            return momentum
        return ("square_avg", *momentum, *(("grad_avg",) if self.centered else ()))

    @property
    def numbers(self) -> tuple[str, ...]:
        """The library's names of the numbers that are kept for all parameters together."""
        return WHOLE_MODEL_STATE.get(self.name, ())


_ONLY_FOR: dict[str, tuple[tuple[str, ...], Any]] = {
    "betas": (("adamw", "adam", "muon", "prodigy", "adamw8bit"), (0.9, 0.999)),
    "eps": (("adamw", "adam", "rmsprop", "muon", "prodigy", "adamw8bit"), 1e-8),
    "momentum": (("sgd", "rmsprop"), 0.0),
    "nesterov": (("sgd",), False),
    "alpha": (("rmsprop",), 0.99),
    "centered": (("rmsprop",), False),
    "muon": (("muon",), None),
    "adafactor": (("adafactor",), None),
    "prodigy": (("prodigy",), None),
}
"""Key -> the optimizers it is for, and its default."""


def make_optimizer(
    parameters: Sequence[LocalParameter], config: OptimizerConfig, hidden: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer over the local rows, with its state in place so that a checkpoint can be read into it. Local.

    Every group has a `lr_scale`; the first one also holds `num_updates`, which decides the bias correction.

    Args:
        hidden: names of the parameters that muon is meant for.

    Raises:
        ConfigError: a group matches no parameter, muon has none, or the optimizer's package is not installed.
    """
    groups = [
        # A rank can be without any row (more ranks than rows); torch wants at least one tensor.
        {"params": [p.local for p in members if p.local.numel()] or [torch.zeros(0)], **settings}
        for members, settings in _grouped(parameters, config, _for_muon(parameters, config, hidden))
    ]
    optimizer = _construct(groups, config)
    optimizer.param_groups[0]["num_updates"] = 0
    return optimizer


def _construct(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    match config.name:
        case "muon":
            of_muon = [group for group in groups if group["muon"]]
            rest = [group for group in groups if not group["muon"]] or [{"params": [torch.zeros(0)], "lr_scale": 1.0}]
            adamw = _elementwise(rest, replace(config, name="adamw", muon=None))
            return MuonAndAdamW(of_muon, adamw, config.lr, config.muon or MuonConfig())
        case "adafactor":
            return make_adafactor(groups, config.lr, config.adafactor or AdafactorConfig())
        case "prodigy":
            return make_prodigy(groups, config.prodigy or ProdigyConfig(), **common)
        case "adamw8bit":
            return make_adamw8bit(groups, **common)
    return _elementwise(groups, config)


def _elementwise(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    optimizer = _of_torch(groups, config)
    for group in groups:
        for tensor in group["params"]:
            if tensor.numel():
                moments = {name: torch.zeros_like(tensor) for name in config.moments}
                optimizer.state[tensor] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def _of_torch(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
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
    raise AssertionError(config.name)


def _for_muon(parameters: Sequence[LocalParameter], config: OptimizerConfig, hidden: Collection[str]) -> frozenset[str]:
    """The names of those of `hidden` that are Muon's; of another optimizer none."""
    if config.name != "muon":
        return frozenset()
    exclude = config.muon.exclude if config.muon else None
    names = (p.name for p in parameters if p.name in hidden)
    found = frozenset(name for name in names if exclude is None or not re.search(exclude, name))
    if not found:
        raise ConfigError(
            f"optimizer.name=muon has no parameter: with optimizer.muon.exclude={exclude} no weight of a linear layer"
            " or convolution inside a block of this model is left to train; exclude less, or take adamw"
        )
    return found


def _grouped(
    parameters: Sequence[LocalParameter], config: OptimizerConfig, of_muon: Collection[str]
) -> list[tuple[list[LocalParameter], dict[str, Any]]]:
    """Parameters with the same settings together, in the order in which the settings first occur."""
    matched: set[str] = set()
    adamw_lr = (config.muon.adamw_lr if config.muon else None) or config.lr
    groups: dict[tuple[float, float, bool], list[LocalParameter]] = {}
    for parameter in parameters:
        group = next((group for group in config.groups if re.search(group.match, parameter.name)), None)
        lr_scale, decay = 1.0, config.weight_decay
        if group is not None:
            matched.add(group.match)
            lr_scale = group.lr_scale
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        if config.decay_exclude == "norms_and_biases" and len(parameter.shape) < 2:
            decay = 0.0
        if config.name == "muon" and parameter.name not in of_muon:
            lr_scale *= adamw_lr / config.lr
        groups.setdefault((lr_scale, decay, parameter.name in of_muon), []).append(parameter)
    for index, group in enumerate(config.groups):
        if group.match not in matched:
            raise ConfigError(
                f"optimizer.groups[{index}].match={group.match} matches no parameter that an earlier group leaves, of"
                f" {parameters[0].name}, {parameters[-1].name}, ...; correct or remove it"
            )
    return [
        (members, {"lr_scale": scale, "weight_decay": decay, "muon": muon})
        for (scale, decay, muon), members in groups.items()
    ]
