from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import UNET, tiny_config, train_tiny
from trainers.errors import ConfigError
from trainers.optimizers import OptimizerConfig, ParameterGroup, make_optimizer
from trainers.parallel import LocalParameter

SHAPES = {"norm.weight": (6,), "linear.weight": (6, 4), "linear.bias": (6,), "head.weight": (7, 20)}
CASES: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": ({"name": "adamw", "betas": (0.8, 0.95)}, torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "adam": ({"name": "adam", "eps": 1e-6}, torch.optim.Adam, {"eps": 1e-6}),
    "sgd": ({"name": "sgd"}, torch.optim.SGD, {}),
    "momentum": ({"name": "sgd", "momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    "rmsprop": ({"name": "rmsprop", "alpha": 0.9}, torch.optim.RMSprop, {"alpha": 0.9}),
    "rmsprop_full": (
        {"name": "rmsprop", "momentum": 0.5, "centered": True},
        torch.optim.RMSprop,
        {"momentum": 0.5, "centered": True},
    ),
}
MOMENTS = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "adam": {"exp_avg", "exp_avg_sq"},
    "sgd": set(),
    "momentum": {"momentum_buffer"},
    "nesterov": {"momentum_buffer"},
    "rmsprop": {"square_avg"},
    "rmsprop_full": {"square_avg", "momentum_buffer", "grad_avg"},
}


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def parameters(tensors: dict[str, torch.Tensor], rows: slice = slice(None)) -> list[LocalParameter]:
    return [
        LocalParameter(
            name=name,
            shape=tuple(t.shape),
            row_offset=0,
            parameter=torch.nn.Parameter(t),
            local=t[rows].clone(),
            computed_with=True,
        )
        for name, t in tensors.items()
    ]


def train(config: OptimizerConfig, held: list[LocalParameter], rows: slice = slice(None)) -> torch.optim.Optimizer:
    optimizer = make_optimizer(held, config)
    for step in range(5):
        for parameter, grad in zip(held, values(100 + step).values(), strict=True):
            parameter.local.grad = grad[rows].clone()
        optimizer.step()
    return optimizer


def whole_vectors(tensor: torch.Tensor) -> torch.Tensor:
    """Flat, with zeros at the end: torch's fused kernel rounds what is left over after whole vectors in another way."""
    return torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % 16))


@pytest.mark.parametrize("case", CASES)
def test_equals_torch_bitwise_and_keeps_its_moments(case):
    settings, cls, options = CASES[case]
    config = OptimizerConfig(lr=0.01, weight_decay=0.1, **settings)
    held = parameters(values(0))
    ours = train(config, held)
    reference = [torch.nn.Parameter(whole_vectors(tensor)) for tensor in values(0).values()]
    way = "fused" if case in ("adamw", "adam") else "foreach"
    theirs: Any = cls(reference, **{"lr": 0.01, "weight_decay": 0.1, way: True, **options})
    for step in range(5):
        for parameter, grad in zip(reference, values(100 + step).values(), strict=True):
            parameter.grad = whole_vectors(grad)
        theirs.step()
    for mine, other in zip(held, reference, strict=True):
        size = mine.local.numel()
        assert torch.equal(mine.local.flatten(), other[:size])
        moments = {key: value for key, value in ours.state[mine.local].items() if key != "step"}
        assert moments.keys() == MOMENTS[case] == set(config.moments)
        assert all(torch.equal(value.flatten(), theirs.state[other][key][:size]) for key, value in moments.items())


@pytest.mark.parametrize("case", CASES)
def test_sharding_changes_no_bit(case):
    config = OptimizerConfig(lr=0.01, weight_decay=0.1, **CASES[case][0])
    whole, first, second = parameters(values(0)), slice(0, 2), slice(2, None)
    train(config, whole)
    shards = [parameters(values(0), rows) for rows in (first, second)]
    for shard, rows in zip(shards, (first, second), strict=True):
        train(config, shard, rows)
    for one, a, b in zip(whole, *shards, strict=True):
        assert torch.equal(one.local, torch.cat([a.local, b.local]))


def settings_by_name(config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    held = parameters(values(0))
    names = {id(parameter.local): parameter.name for parameter in held}
    return {
        names[id(tensor)]: (group["lr_scale"], group["weight_decay"])
        for group in make_optimizer(held, config).param_groups
        for tensor in group["params"]
    }


def test_norms_and_biases_do_not_decay():
    found = settings_by_name(OptimizerConfig(weight_decay=0.1, decay_exclude="norms_and_biases"))
    assert found == {
        "norm.weight": (1.0, 0.0),
        "linear.weight": (1.0, 0.1),
        "linear.bias": (1.0, 0.0),
        "head.weight": (1.0, 0.1),
    }
    assert {decay for _, decay in settings_by_name(OptimizerConfig(weight_decay=0.1)).values()} == {0.1}


def test_the_first_group_that_matches_counts():
    groups = (
        ParameterGroup(match=r"^head\.", lr_scale=0.1),
        ParameterGroup(match="weight$", weight_decay=0.5),
    )
    assert settings_by_name(OptimizerConfig(weight_decay=0.1, groups=groups)) == {
        "norm.weight": (1.0, 0.5),
        "linear.weight": (1.0, 0.5),
        "linear.bias": (1.0, 0.1),
        "head.weight": (0.1, 0.1),
    }
    with pytest.raises(ConfigError, match=r"optimizer.groups\[1\].match=heed matches no parameter"):
        settings_by_name(OptimizerConfig(groups=(*groups[:1], ParameterGroup(match="heed"))))


def test_a_rank_without_rows_has_an_optimizer_too():
    held = parameters(values(0), slice(0, 0))
    assert not train(OptimizerConfig(name="sgd", momentum=0.9), held, slice(0, 0)).state


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"name": "sgd", "eps": 1e-6}, "eps=1e-06 has no effect on name=sgd; it is for adamw and adam and rmsprop"),
        ({"momentum": 0.9}, "momentum=0.9 has no effect on name=adamw; it is for sgd and rmsprop"),
        ({"name": "sgd", "nesterov": True}, "nesterov=true needs momentum"),
        ({"decay_exclude": "norms_and_biases"}, "has no effect without weight_decay"),
    ],
)
def test_refusals(settings, word):
    with pytest.raises(ConfigError, match=word):
        OptimizerConfig(**settings)


def test_refusals_of_a_group():
    with pytest.raises(ConfigError, match=r"match=\( is no regular expression"):
        ParameterGroup(match="(")
    with pytest.raises(ConfigError, match="lr_scale=-1"):
        ParameterGroup(match="x", lr_scale=-1.0)


def test_the_contract_holds_with_groups_momentum_and_every_source_of_noise():
    config = tiny_config(
        UNET,
        objective={
            "prediction_type": "flow",
            "weighting": "cosmap",
            "timestep_density": "logit_normal",
            "contrastive": 0.05,
            "offset_noise": 0.1,
            "input_perturbation": 0.1,
        },
        optimizer={
            "name": "rmsprop",
            "momentum": 0.9,
            "decay_exclude": "norms_and_biases",
            "groups": [{"match": "conv_in", "lr_scale": 0.5}],
        },
        ema={"power": {"kind": "power", "sigma_rel": 0.1}},
        train={"ema_health_every": 2},
    )
    one, two = (run_ranks(w, train_tiny, config, 4) for w in (1, 2))
    assert two == [one[0]] * 2
    metrics, tensors = one[0]
    assert {name.rsplit("/", 1)[0] for name in tensors} >= {"optimizer/square_avg", "optimizer/momentum_buffer"}
    assert [step.get("ema/power/missed_updates") for step in metrics] == [None, 0, None, 0]
    assert metrics[1]["ema/power/distance"] > 0 and "ema/slow/distance" in metrics[3]
