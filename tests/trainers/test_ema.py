from __future__ import annotations

import json

import pytest
import torch
from diffusers.training_utils import EMAModel

from trainers.ema import EMA, EMAConfig, decay_of_update, gamma_of, sigma_rel_of
from trainers.errors import ConfigError

SHAPES = {"a": (5, 3), "empty": (0, 3), "scalar": (), "b": (17,)}


def weights(step=0):
    """The weights after `step` steps of a random walk that can be asked for at any step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def run(profiles, steps, start=0, ema=None, parameters=None, samples_per_step=8):
    parameters = weights(start) if parameters is None else parameters
    ema = EMA(profiles, parameters, samples_per_step) if ema is None else ema
    for step in range(start + 1, steps + 1):
        for name, value in weights(step).items():
            parameters[name].copy_(value)
        ema.update(step)
    return ema


def test_which_profiles_are_about_to_get_their_memory():
    profiles = {name: EMAConfig(decay=0.9, start_step=start) for name, start in (("a", 0), ("b", 1), ("c", 3))}
    ema = EMA(profiles, weights(), 8)
    assert (ema.beginning(1), ema.beginning(3)) == (["b"], ["b", "c"])
    ema.update(1)
    assert (ema.beginning(2), ema.beginning(3)) == ([], ["c"]) and ema.tensors().keys() == {"a", "b"}


@pytest.mark.parametrize("kind", ["warmup", "constant"])
def test_equals_diffusers(kind):
    ours = run({"main": EMAConfig(kind=kind, decay=0.97)}, 200)
    parameters = [torch.nn.Parameter(value) for value in weights().values()]
    theirs = EMAModel(parameters, decay=0.97, min_decay=0.97 if kind == "constant" else 0.0)
    for step in range(1, 201):
        for parameter, value in zip(parameters, weights(step).values(), strict=True):
            parameter.data.copy_(value)
        theirs.step(parameters)
    for mine, other in zip(ours.tensors()["main"].values(), theirs.shadow_params, strict=True):
        # Two float32 roundings of the same recursion: theirs subtracts, ours interpolates.
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"decay": 0.9},
        {"decay": 0.9, "start_step": 0},
        {"half_life_samples": 40},
        {"num_steps": 30},
        {"kind": "warmup", "decay": 0.8, "start_step": 9},
        {"kind": "sma", "num_steps": 20, "start_step": 5},
        {"kind": "sma"},
        {"decay": 0.9, "every": 4, "start_step": 3},
    ],
)
def test_equals_a_float64_reference(config):
    config = EMAConfig(**config)
    average = run({"main": config}, 60).tensors()["main"]
    expected = weights(config.start_step)["b"].double()
    num_updates = 0
    for step in range(config.start_step + config.every, 61, config.every):
        decay = decay_of_update(config, num_updates, samples_per_step=8)
        expected = decay * expected + (1 - decay) * weights(step)["b"].double()
        num_updates += 1
    torch.testing.assert_close(average["b"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "num_updates", "expected"),
    [
        ({"decay": 0.9}, 0, 0.9),
        ({"decay": 0.9, "every": 3}, 5, 0.9**3),
        ({"half_life_samples": 80}, 0, 0.5**0.1),
        ({"half_life_samples": 80, "every": 10}, 0, 0.5),
        ({"num_steps": 9}, 3, 0.8),
        ({"kind": "warmup", "decay": 0.999}, 0, 2 / 11),
        ({"kind": "warmup", "decay": 0.999}, 99, 101 / 110),
        ({"kind": "warmup", "decay": 0.5}, 99, 0.5),
        ({"kind": "warmup", "decay": 0.999, "every": 2}, 0, (3 / 12) ** 2),
        ({"kind": "sma", "num_steps": 4}, 0, 1 / 2),
        ({"kind": "sma", "num_steps": 4}, 2, 3 / 4),
        ({"kind": "sma", "num_steps": 4}, 50, 3 / 4),
        ({"kind": "sma"}, 98, 99 / 100),
        ({"kind": "power", "gamma": 1.0}, 0, 1 / 4),
        ({"kind": "power", "gamma": 0.0}, 98, 99 / 100),
        ({"kind": "power", "sigma_rel": 0.1}, 998, (999 / 1000) ** 7.937203937601809),
    ],
)
def test_decay_table(config, num_updates, expected):
    assert decay_of_update(EMAConfig(**config), num_updates, samples_per_step=8) == pytest.approx(expected)


def test_sma_is_the_mean_of_its_window():
    ema = run({"tail": EMAConfig(kind="sma", num_steps=10, start_step=21)}, 30)
    mean = torch.stack([weights(step)["a"] for step in range(21, 31)]).double().mean(0)
    torch.testing.assert_close(ema.tensors()["tail"]["a"].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.9722), (0.10, 6.9372)])
def test_gammas_of_the_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-5)
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
    assert gamma_of(sigma_rel_of(0.0) - 1e-12) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("start_step", "every"), [(1, 1), (5, 1), (3, 4)])
def test_power_is_the_average_under_its_profile(start_step, every):
    config = EMAConfig(kind="power", sigma_rel=0.1, start_step=start_step, every=every)
    average = run({"main": config}, 60).tensors()["main"]["b"].double()
    taken = torch.stack([weights(step)["b"] for step in range(start_step, 61, every)]).double()
    edges = torch.linspace(0, 1, len(taken) + 1, dtype=torch.float64) ** (config.exponent + 1)  # the integral of it
    torch.testing.assert_close(average, edges.diff() @ taken, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [{"decay": 0.9}, {"decay": 0.9, "start_step": 4, "every": 3}])
def test_missed_updates_are_counted(config):
    ema = run({"main": EMAConfig(**config)}, 20)
    assert ema.missed_updates(20) == {"main": 0}
    assert ema.missed_updates(29) == {"main": 9 // config.get("every", 1)}
    assert ema.missed_updates(config.get("start_step", 1) - 1) == {}


def test_nothing_exists_before_start_step_and_then_it_is_a_copy():
    profiles = {"late": EMAConfig(decay=0.9, start_step=4), "early": EMAConfig(decay=0.9, start_step=0)}
    ema = EMA(profiles, weights(), 8)
    assert list(ema.tensors()) == ["early"]
    run(profiles, 3, ema=ema, parameters=(parameters := weights()))
    assert list(ema.tensors()) == ["early"] and not ema.scalars()["late"]["started"]
    ema = run(profiles, 4, parameters=parameters)
    assert all(torch.equal(ema.tensors()["late"][name], value) for name, value in weights(4).items())


def test_every_updates_only_then_and_in_place():
    ema = run({"main": EMAConfig(decay=0.5, every=3)}, 3)
    before = {name: value.clone() for name, value in ema.tensors()["main"].items()}
    pointers = {name: value.data_ptr() for name, value in ema.tensors()["main"].items()}
    assert torch.equal(before["a"], weights(1)["a"])
    parameters = weights()
    ema._parameters = list(parameters.values())
    run({}, 4, start=3, ema=ema, parameters=parameters)
    after = ema.tensors()["main"]
    assert not torch.equal(before["a"], after["a"])
    assert pointers == {name: value.data_ptr() for name, value in after.items()}


@pytest.mark.parametrize("middle", [2, 13, 31])
def test_restored_midway_it_ends_in_the_same_bits(middle):
    profiles = {
        "main": EMAConfig(kind="warmup", decay=0.99),
        "late": EMAConfig(half_life_samples=30, start_step=20),
        "sma": EMAConfig(kind="sma", num_steps=7, every=2),
        "power": EMAConfig(kind="power", sigma_rel=0.05),
    }
    straight = run(profiles, 40)
    first = run(profiles, middle)
    parameters = weights(middle)
    second = EMA(profiles, parameters, 8)
    second.load_scalars(json.loads(json.dumps(first.scalars())))
    assert second.scalars() == first.scalars()
    for profile, tensors in first.tensors().items():
        for name, value in tensors.items():
            second.tensors()[profile][name].copy_(value)
    run(profiles, 40, start=middle, ema=second, parameters=parameters)
    for profile, tensors in straight.tensors().items():
        for name, value in tensors.items():
            assert torch.equal(value, second.tensors()[profile][name]), (profile, name)


def test_sharding_does_not_change_bits():
    profiles = {"main": EMAConfig(kind="warmup", decay=0.999)}
    values = [torch.randn(37, 5, generator=torch.Generator().manual_seed(step)) for step in range(20)]

    def average(cuts):
        shards = [shard.clone() for shard in values[0].tensor_split(cuts)]
        averages = [EMA(profiles, {"p": shard}, 8) for shard in shards]
        for step, value in enumerate(values[1:], start=1):
            for shard, part, ema in zip(shards, value.tensor_split(cuts), averages, strict=True):
                shard.copy_(part)
                ema.update(step)
        return torch.cat([ema.tensors()["main"]["p"] for ema in averages])

    whole = average([])
    for cuts in ([1], [13, 14, 30], [5, 5, 36], list(range(1, 37))):
        assert torch.equal(average(cuts), whole)


@pytest.mark.parametrize(
    ("now", "word"),
    [
        ({}, "ema.main is in the checkpoint but not in the config"),
        ({"main": EMAConfig(decay=0.9), "new": EMAConfig(decay=0.5)}, "ema.new is in the config but not in the check"),
        ({"main": EMAConfig(decay=0.99)}, "ema.main.decay=0.99 differs from the checkpoint's 0.9"),
        ({"main": EMAConfig(decay=0.9, every=2)}, "ema.main.every=2 differs from the checkpoint's 1"),
    ],
)
def test_an_average_is_never_dropped_started_cold_or_changed_silently(now, word):
    saved = run({"main": EMAConfig(decay=0.9)}, 3).scalars()
    with pytest.raises(ConfigError, match=word):
        EMA(now, weights(), 8).load_scalars(saved)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({}, "give exactly one of"),
        ({"decay": 0.9, "num_steps": 3}, "decay=0.9 and num_steps=3"),
        ({"kind": "sma", "decay": 0.9}, "decay=0.9 does not go with kind=sma"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"half_life_samples": 0}, "half_life_samples=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"decay": 0.9, "start_step": -1}, "start_step=-1"),
        ({"decay": 0.9, "every": 0}, "every=0"),
        ({"kind": "power"}, "gamma=null: give exactly one of gamma and sigma_rel to kind=power"),
        ({"kind": "power", "gamma": 3.0, "sigma_rel": 0.1}, "gamma=3.0 and sigma_rel=0.1: give exactly one"),
        ({"kind": "power", "decay": 0.9}, "decay=0.9 does not go with kind=power; give gamma or sigma_rel"),
        ({"decay": 0.9, "sigma_rel": 0.1}, "sigma_rel=0.1 does not go with kind=constant"),
        ({"kind": "power", "sigma_rel": 0.3}, "sigma_rel=0.3 must be at least 1e-09 and below"),
        ({"kind": "power", "sigma_rel": 1e-200}, "sigma_rel=1e-200 must be at least 1e-09 and below"),
        ({"kind": "power", "gamma": -1.0}, "gamma=-1.0"),
    ],
)
def test_refusals(config, word):
    with pytest.raises(ConfigError, match=word):
        EMAConfig(**config)
