from __future__ import annotations

import math
import tracemalloc

import pytest
from omegaconf import OmegaConf

from orchestrator.messages.attempts import Event
from orchestrator.search.trials import (
    Result,
    check_metric,
    last_mean,
    last_validation,
    make_trials,
    parse_parameter,
    ranked,
)
from trainers.errors import ConfigError


def trials(*params: str, samples: int = 1, seed: int = 0):
    return make_trials("run", [parse_parameter(text) for text in params], samples, seed)


def test_a_grid_is_every_combination():
    found = trials("optimizer.lr=[1e-4, 0.001]", "objective.weighting=[none, min_snr]")
    assert [tuple(trial.values.values()) for trial in found] == [
        (0.0001, "none"),
        (0.0001, "min_snr"),
        (0.001, "none"),
        (0.001, "min_snr"),
    ]
    assert len({trial.name for trial in found}) == 4
    assert found[0].overrides == [f"run.name={found[0].name}", "optimizer.lr=0.0001", 'objective.weighting="none"']


def test_values_of_any_text_are_taken_by_a_config():
    (found,) = trials("samples.prompts=[['\U0001f600 \u00e9']]")
    assert OmegaConf.from_dotlist(found.overrides).samples.prompts == ["\U0001f600 \u00e9"]


def test_draws_are_a_function_of_seed_sample_and_key():
    params = ("optimizer.lr=loguniform(1e-5, 1e-2)", "ema.main.decay=uniform(0.9, 0.99)", "seed=randint(0, 9)")
    found = trials(*params, samples=50)
    assert found == trials(*params, samples=50) and found[:20] == trials(*params, samples=20)
    assert found != trials(*params, samples=50, seed=1)
    values = [trial.values for trial in found]
    assert all(1e-5 <= value["optimizer.lr"] < 1e-2 for value in values)
    below = sum(value["optimizer.lr"] < math.sqrt(1e-7) for value in values)
    assert 15 < below < 35, "half of them in the lower half of the logarithms"
    assert {value["seed"] for value in values} == set(range(9))
    alone = trials(params[0], samples=50)
    assert [trial.values["optimizer.lr"] for trial in alone] == [value["optimizer.lr"] for value in values]


def test_a_grid_and_draws():
    found = trials("seed=[1, 2]", "optimizer.name=choice(adam, sgd)", samples=3)
    assert len(found) <= 6 and {trial.values["seed"] for trial in found} == {1, 2}
    assert {trial.values["optimizer.name"] for trial in found} <= {"adam", "sgd"}


def test_the_same_values_are_the_same_run():
    assert trials("seed=[1, 2]")[1] == trials("seed=[2, 3]")[0]
    assert len(trials("seed=[1, 1]")) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer.lr", "known form"),
        ("optimizer.lr=0.1", "known form"),
        ("optimizer.lr=[]", "known form"),
        ("optimizer.lr=[1", "known form"),
        ("optimizer.lr=normal(0, 1)", "known form"),
        ("optimizer.lr=uniform(2, 1)", "lower and a higher number"),
        ("optimizer.lr=loguniform(0, 1)", "above 0"),
        ("seed=randint(0.5, 2)", "integer"),
        ("seed=randint(0, 9223372036854775808)", "integer"),
        ("optimizer.lr=uniform(0, inf)", "lower and a higher number"),
        ("optimizer.lr=loguniform(1, .inf)", "above 0"),
        ("optimizer.lr=uniform(-1e308, 1e308)", "lower and a higher number"),
        ("data.path=[2026-11-30, 2026-12-01]", "no dates"),
        ("run.name=[a, b]", "decides no number"),
        ("storage=[a, b]", "decides no number"),
    ],
)
def test_what_is_no_parameter_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_parameter(text)


def test_what_has_no_effect_is_refused():
    with pytest.raises(ConfigError, match="samples 2"):
        trials("seed=[1, 2]", samples=2)
    with pytest.raises(ConfigError, match="twice"):
        trials("seed=[1, 2]", "seed=[3]")


def test_the_metric_is_the_mean_of_the_last_tenth():
    losses = [float(step) for step in range(1, 41)]
    assert last_mean(losses) == 38.5
    assert last_mean([*losses, None, "odd"]) == 38.5
    assert last_mean(losses[:3]) == 3.0 and last_mean([None] * 40) is None and last_mean([]) is None


def test_the_losses_of_a_long_run_are_not_held():
    tracemalloc.start()
    try:
        found = last_mean(float(step) for step in range(100_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == 94_999.5 and peak < 256 << 10, peak


def test_a_validation_is_the_newest_that_was_measured():
    events = [
        Event(kind="validation", fields={"step": step, "metrics": metrics}, time_s=float(step))
        for step, metrics in ((1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": None}))
    ]
    assert last_validation(events, "loss") == 2.0 and last_validation(events, "kid/means") is None


@pytest.mark.parametrize(
    ("metric", "validates", "word"),
    [
        ("los", True, "--metric los is not measured; give loss, grad_norm or validation/loss"),
        ("validation/loss", False, "nothing is held out"),
        ("validation/los", True, "--metric validation/los is not measured"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_anything_is_trained(metric, validates, word):
    for known in (
        "loss",
        "ema/main/distance",
        *(["validation/loss/ema/main", "validation/kid/lite0"] if validates else []),
    ):
        check_metric(known, validates)
    with pytest.raises(ConfigError, match=word):
        check_metric(metric, validates)


def test_the_best_is_the_first_and_what_was_not_measured_the_last():
    results = [
        Result(name=str(metric), url="", values={}, state="finished", step=1, metric=metric)
        for metric in (2.0, None, 1.0)
    ]
    assert [result.metric for result in ranked(results, "min")] == [1.0, 2.0, None]
    assert [result.metric for result in ranked(results, "max")] == [2.0, 1.0, None]
