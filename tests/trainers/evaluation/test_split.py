from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainers.errors import ConfigError
from trainers.evaluation.config import SamplesConfig, ValidationConfig
from trainers.evaluation.split import split


def held_out(size: int, seed: int = 7, **settings: Any) -> list[int]:
    trained_on, validated = split(ValidationConfig(**settings), seed, size)
    assert trained_on is not None and validated is not None
    assert sorted([*trained_on.tolist(), *validated.tolist()]) == list(range(size))
    assert (np.diff(trained_on) > 0).all() and (np.diff(validated) > 0).all()
    return validated.tolist()


def test_nothing_is_held_out_unless_asked_for() -> None:
    assert split(ValidationConfig(), 7, 10) == (None, None)


def test_a_number_or_a_share_of_the_samples_is_held_out() -> None:
    assert len(held_out(1000, num_samples=17)) == 17
    assert 60 < len(held_out(1000, fraction=0.1)) < 140
    assert held_out(1000, num_samples=17) == held_out(1000, num_samples=17) != held_out(1000, seed=8, num_samples=17)


def test_a_sample_stays_on_its_side_when_the_data_grows() -> None:
    assert [index for index in held_out(2000, fraction=0.1) if index < 1000] == held_out(1000, fraction=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 10}, "validation.num_samples=10 holds out all of the 10 samples"),
        ({"fraction": 0.001}, "validation.fraction=0.001 holds out none of the 10 samples"),
    ],
)
def test_neither_side_may_be_empty(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(ValidationConfig(**settings), 7, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.1, "num_samples": 3}, "give one of them"),
        ({"fraction": 1.0}, "fraction=1.0 must be between 0 and 1"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_samples": 3, "every_steps": 0}, "every_steps=0 must be at least 1"),
        ({"every_steps": 50}, "every_steps=50 has no effect, as nothing is held out"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ValidationConfig(**settings)


def test_when_an_evaluation_is_due() -> None:
    validation = ValidationConfig(num_samples=3, every_steps=4)
    assert [step for step in range(1, 11) if validation.due(step, 10)] == [4, 8, 10]
    assert not any(ValidationConfig(num_samples=3, every_steps=None).due(step, 10) for step in range(1, 11))
    assert not SamplesConfig().due(10, 10) and SamplesConfig(every_steps=3).due(9, 10)


@pytest.mark.parametrize(
    ("weights", "profiles", "chosen"),
    [
        ((), ["slow", "late"], ["slow"]),
        ((), [], ["raw"]),
        (("raw", "ema", "slow"), ["slow", "late"], ["raw", "slow"]),
        (("late",), ["slow", "late"], ["late"]),
    ],
)
def test_which_weights_are_drawn_from(weights: tuple[str, ...], profiles: list[str], chosen: list[str]) -> None:
    samples = SamplesConfig(weights=weights)
    samples.check_weights(profiles)
    assert samples.chosen(profiles) == chosen


@pytest.mark.parametrize(("name", "profiles"), [("fast", ["slow"]), ("ema", [])])
def test_weights_that_are_not_there_are_refused(name: str, profiles: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"no weights {name}; give raw"):
        SamplesConfig(weights=(name,)).check_weights(profiles)
