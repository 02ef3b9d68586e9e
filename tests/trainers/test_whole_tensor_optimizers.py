"""Muon, Adafactor, Prodigy and 8-bit AdamW: as in their libraries, and the same bits for every number of workers."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from contextlib import nullcontext
from typing import Any

import prodigyopt
import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.test_optimizers import parameters, whole_vectors
from tests.trainers.tiny import DIT, UNET, build_tiny, tiny_config
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError, StateMismatchError
from trainers.memory import optimizer_bytes
from trainers.models import ModelConfig, empty_model
from trainers.optimizers import OptimizerConfig, make_optimizer
from trainers.progress import Progress
from trainers.state import fingerprints
from trainers.step import train_step
from trainers.whole_tensor_optimizers import (
    WHOLE_TENSOR_STATE,
    AdafactorConfig,
    MuonConfig,
    ProdigyConfig,
    hidden_matrices,
)

SHAPES = {"conv.weight": (16, 32, 3, 3), "linear.weight": (6, 4), "norm.weight": (6,), "zero.weight": (3, 5)}
HIDDEN = {"conv.weight", "linear.weight", "zero.weight"}
HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None
"""Not installed for the tests: where it is, diffusers imports it in every process, which takes a second each."""
NAMES = [name for name in WHOLE_TENSOR_STATE if HAS_8BIT or name != "adamw8bit"]
SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"lr": 0.02, "muon": {"adjust_lr": "original", "adamw_lr": 0.004}},
    "adafactor": {"lr": 0.02},
    "prodigy": {"lr": 1.0},
    "adamw8bit": {"lr": 0.002},
}


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: value * (seed > 0 or name != "zero.weight") for name, value in drawn.items()}


Theirs = list[torch.optim.Optimizer]


def muon(given: dict[str, torch.Tensor], **options: Any) -> tuple[dict[str, torch.Tensor], Theirs]:
    held = {name: t.flatten(1) if name in HIDDEN else whole_vectors(t) for name, t in given.items()}
    of_adamw = [t for name, t in held.items() if name not in HIDDEN]
    return held, [
        torch.optim.Muon([held[name] for name in given if name in HIDDEN], lr=0.02, weight_decay=0.1, **options),
        torch.optim.AdamW(of_adamw, lr=0.02 * (0.004 / 0.02), weight_decay=0.1, betas=(0.8, 0.95), fused=True),
    ]


def one(cls: Any, **options: Any) -> Any:
    return lambda given: (given, [cls(list(given.values()), weight_decay=0.1, **options)])


PRODIGY = {"d_coef": 2.0, "growth_rate": 1.5, "use_bias_correction": True, "safeguard_warmup": True, "slice_p": 3}
BETAS = {"betas": (0.8, 0.95)}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "muon": ({**BETAS, "muon": MuonConfig(adjust_lr="original", adamw_lr=0.004)}, muon),
    "muon with options": (
        {**BETAS, "muon": MuonConfig(momentum=0.9, nesterov=False, ns_steps=3, adamw_lr=0.004)},
        lambda given: muon(given, momentum=0.9, nesterov=False, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ),
    "adafactor": ({}, one(torch.optim.Adafactor, lr=0.02)),
    "adafactor with options": (
        {"adafactor": AdafactorConfig(beta2_decay=-0.5, d=1.5, min_rms=0.1)},
        one(torch.optim.Adafactor, lr=0.02, beta2_decay=-0.5, d=1.5, eps=(None, 0.1)),
    ),
    "prodigy": (BETAS, one(prodigyopt.Prodigy, lr=0.02, **BETAS)),
    "prodigy with options": ({"prodigy": ProdigyConfig(**PRODIGY)}, one(prodigyopt.Prodigy, lr=0.02, **PRODIGY)),
}


def of_8bit(given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Theirs]:
    import bitsandbytes

    return given, [bitsandbytes.optim.AdamW8bit(list(given.values()), lr=0.02, eps=1e-6, weight_decay=0.1)]


OF_8BIT = ({"eps": 1e-6}, of_8bit)


def step(held: dict[str, torch.Tensor], optimizers: Theirs, seed: int) -> None:
    for (name, tensor), grad in zip(held.items(), values(seed).values(), strict=True):
        whole = whole_vectors(grad) if tensor.shape != grad.shape and name not in HIDDEN else grad
        tensor.grad = whole.reshape(tensor.shape).clone()
    for optimizer in optimizers:
        optimizer.step()


def compare(case: str, settings: dict[str, Any], make: Any) -> torch.Tensor:
    """Five steps bitwise as the library makes them, with the same state after; some of the weights."""
    config = OptimizerConfig(name=case.split()[0], lr=0.02, weight_decay=0.1, **settings)  # type: ignore[arg-type]
    ours = parameters(values(0))
    optimizer = make_optimizer(ours, config, HIDDEN)
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * group["lr_scale"]
    held = {parameter.name: parameter.local for parameter in ours}
    theirs, others = make({name: tensor.clone() for name, tensor in values(0).items()})
    for seed in range(1, 6):
        step(held, [optimizer], seed)
        step(theirs, others, seed)
    for name, mine in held.items():
        other = theirs[name]
        assert torch.equal(mine.flatten(), other.flatten()[: mine.numel()]), (case, name)
        (kept,) = [o.state[other] for o in others if other in o.state]
        keys = set(config.moments) & kept.keys()
        assert keys and keys == set(config.moments) & optimizer.state[mine].keys(), (case, name)
        for key in keys:
            found, expected = optimizer.state[mine][key].flatten(), kept[key].flatten()[: len(mine.flatten())]
            # Prodigy keeps the first weights of a tensor of zeros as one zero.
            assert found.dtype == expected.dtype and torch.equal(found, expected.expand_as(found)), (case, name, key)
    for number in config.numbers:
        assert optimizer.param_groups[0][number] == others[0].param_groups[0][number] != 0, (case, number)
    return held["conv.weight"]


def test_equals_its_library_bitwise_and_keeps_its_state() -> None:
    ends = {case: compare(case, *CASES[case]) for case in CASES}
    assert len({tensor.sum().item() for tensor in ends.values()}) == len(CASES), "every option changes something"


@pytest.mark.skipif(not HAS_8BIT, reason="no adamw8bit in these tests: pip install bitsandbytes")
def test_8bit_equals_its_library_bitwise_and_keeps_its_state() -> None:
    compare("adamw8bit", *OF_8BIT)


def configuration(name: str, **optimizer: Any) -> dict[str, Any]:
    plain = tiny_config(
        UNET,
        optimizer={"name": name, **SETTINGS[name], "decay_exclude": "norms_and_biases", **optimizer},
        ema={"slow": {"decay": 0.9}},
        parallel={"strategy": "ddp"},
        train={"global_batch_size": 6, "microbatch_size": 2},
    )
    return {**plain, "schedule": {"kind": "linear"}}


Saved = tuple[dict[str, torch.Tensor], str, Progress]


def train_all(saved: bytes | None) -> dict[str, Any]:
    """Two steps with every optimizer, or the second from what was saved after the first. Collective.

    Returns:
        Of each the fingerprints and scalars after the second step, and the state after the first.
    """
    found = {}
    for name in NAMES:
        state, task = build_tiny(configuration(name))
        kept: Saved | None = None
        if saved is not None:
            tensors, scalars, state.progress = pickle.loads(saved)[name]
            without = {key: value for key, value in json.loads(scalars).items() if key != "optimizer"}
            with pytest.raises(StateMismatchError) if name == "prodigy" else nullcontext():
                state.load_scalars(without)
            state.load_scalars(json.loads(scalars))
            for local in state.tensors():
                assert local.spec.shape == tuple(local.tensor.shape) and not local.row_offset
                local.tensor.copy_(tensors[local.spec.name])
            assert {local.spec.name for local in state.tensors()} == tensors.keys()
        while state.progress.step < 2:
            train_step(state, task)
            state.generators.capture()
            if state.progress.step == 1:
                tensors = {local.spec.name: local.tensor.clone() for local in state.tensors()}
                kept = tensors, json.dumps(state.scalars()), state.progress
        found[name] = fingerprints(state), json.dumps(state.scalars()), kept
    return found


def test_one_result_for_every_number_of_workers_and_history() -> None:
    """One rank; and three that go on from what it saved: state of other shapes, and of uint8."""
    (straight,) = run_ranks(1, train_all, None)
    saved = {name: kept for name, (_, _, kept) in straight.items()}
    expected = {name: ends for name, (*ends, _) in straight.items()}
    by_value = pickle.dumps(saved)  # tensors would go as one file descriptor each
    for found in run_ranks(3, train_all, by_value):
        assert {name: ends for name, (*ends, _) in found.items()} == expected
    for name, (tensors, _, _) in saved.items():
        kinds = {key.split("/")[1] for key in tensors if key.startswith("optimizer/")}
        assert kinds == set(WHOLE_TENSOR_STATE[name])
        if name == "adamw8bit":
            assert any(tensor.dtype == torch.uint8 for key, tensor in tensors.items() if "state1" in key)
    assert json.loads(saved["prodigy"][1])["optimizer"]["k"] == 1


@pytest.mark.parametrize("model", [UNET, DIT], ids=["unet", "dit"])
def test_muon_is_for_the_matrices_inside_the_blocks(model: dict[str, Any]) -> None:
    built = empty_model(decode(ModelConfig, model), 0)
    hidden = hidden_matrices(built)
    shapes = {name: parameter.ndim for name, parameter in built.named_parameters()}
    assert hidden <= shapes.keys() and all(shapes[name] in (2, 4) for name in hidden)
    inside = ("transformer_blocks.", "down_blocks.", "mid_block.", "up_blocks.")
    others = [name for name in shapes.keys() - hidden if shapes[name] > 1]
    assert others and all(not name.startswith(inside) or "embedding_table" in name for name in others)
    assert all(name.startswith(inside) for name in hidden)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_of_memory_is_what_is_held(name: str) -> None:
    config = decode(TrainerConfig, configuration(name))
    with torch.device("meta"):
        planned = empty_model(config.model, 0)
    expected = optimizer_bytes(planned, config.optimizer)
    held = empty_model(config.model, 0)
    assert optimizer_bytes(held, config.optimizer) == expected
    weights = sum(4 * parameter.numel() for parameter in held.parameters())
    assert {"muon": 1, "adafactor": 0.1, "prodigy": 4, "adamw8bit": 1}[name] * weights <= expected
    assert expected <= {"muon": 1.3, "adafactor": 1, "prodigy": 4, "adamw8bit": 2}[name] * weights


@pytest.mark.parametrize("parallel", [{"strategy": "fsdp"}, {"strategy": "hsdp", "shard_size": 2}])
@pytest.mark.parametrize("name", WHOLE_TENSOR_STATE)
def test_a_strategy_that_cuts_tensors_is_refused(name: str, parallel: dict[str, Any]) -> None:
    plain = {**configuration(name), "parallel": parallel}
    with pytest.raises(ConfigError, match=f"parallel.strategy={parallel['strategy']} cuts.*{name}.*strategy=ddp"):
        decode(TrainerConfig, plain)
    plain["parallel"] = {"strategy": "hsdp", "shard_size": 1}
    assert decode(TrainerConfig, plain).optimizer.name == name


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"name": "adafactor", "betas": [0.9, 0.99]}, r"betas=.* has no effect on name=adafactor; it is for adamw"),
        ({"name": "muon", "momentum": 0.9}, "momentum=0.9 has no effect on name=muon"),
        (
            {"muon": {"momentum": 0.9}},
            "optimizer.muon={'momentum': 0.9, .* has no effect on name=adamw; it is for muon",
        ),
        ({"name": "prodigy"}, "optimizer.lr=0.0001 is a factor .* set it to 1"),
        ({"name": "prodigy", "lr": 1.0, "groups": [{"match": "x", "lr_scale": 0.5}]}, r"groups\[0\].lr_scale=0.5 does"),
        ({"name": "muon", "muon": {"adjust_lr": "original"}}, "optimizer.muon.adamw_lr=null does not go with"),
        ({"name": "muon", "muon": {"momentum": 0.0}}, "optimizer.muon.nesterov=true needs momentum"),
        ({"name": "muon", "muon": {"momentum": 1.0}}, "muon.momentum=1.0"),
        ({"name": "muon", "muon": {"ns_steps": 0}}, "muon.ns_steps=0"),
        ({"name": "muon", "muon": {"adamw_lr": 0.0}}, "muon.adamw_lr=0.0"),
        ({"name": "muon", "muon": {"exclude": "("}}, r"muon.exclude=\( is no regular expression"),
        ({"name": "adafactor", "adafactor": {"beta2_decay": 0.8}}, "adafactor.beta2_decay=0.8"),
        ({"name": "adafactor", "adafactor": {"d": 0.5}}, "adafactor.d=0.5"),
        ({"name": "adafactor", "adafactor": {"min_rms": 0.0}}, "adafactor.min_rms=0.0"),
        ({"name": "prodigy", "prodigy": {"d_coef": 0.0}}, "prodigy.d_coef=0.0"),
        ({"name": "prodigy", "prodigy": {"growth_rate": 1.0}}, "prodigy.growth_rate=1.0"),
        ({"name": "prodigy", "prodigy": {"slice_p": 0}}, "prodigy.slice_p=0"),
    ],
)
def test_refusals(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        decode(OptimizerConfig, settings, "optimizer")


def test_what_is_excluded_goes_to_adamw_and_somebody_has_to_be_left() -> None:
    some = OptimizerConfig(name="muon", muon=MuonConfig(exclude="conv"))
    state = make_optimizer(held := parameters(values(0)), some, HIDDEN).state
    kept = {parameter.name: set(state[parameter.local]) & set(some.moments) for parameter in held}
    adamw = {"exp_avg", "exp_avg_sq"}
    expected = {"conv.weight": adamw, "norm.weight": adamw, "linear.weight": {"momentum_buffer"}}
    assert kept == {**expected, "zero.weight": {"momentum_buffer"}}
    with pytest.raises(ConfigError, match=r"name=muon has no parameter.*exclude=weight"):
        make_optimizer(parameters(values(0)), OptimizerConfig(name="muon", muon=MuonConfig(exclude="weight")), HIDDEN)


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_a_package_that_is_not_installed_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"optimizer.name={name} needs {package}; run: pip install {package}"):
        make_optimizer(parameters(values(0)), OptimizerConfig(name=name, lr=1.0))  # type: ignore[arg-type]
