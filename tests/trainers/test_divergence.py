from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.data.sampler import sample_indices
from trainers.data.samples import Samples
from trainers.divergence import DivergenceConfig, DivergenceGuard, spike_limit
from trainers.errors import ConfigError, DivergedError
from trainers.exclusions import Exclusions
from trainers.state import fingerprints
from trainers.step import train_step

CALM = [1.0 + 0.01 * (step % 5) for step in range(8)]


def guard(**changes: Any) -> DivergenceGuard:
    fields = {"window": 8, "spike_mads": 10.0, "patience": 3, "rollback_steps": 2} | changes
    return DivergenceGuard(DivergenceConfig(**fields))


def judge(watched: DivergenceGuard, losses: list[float], norms: list[float] | None = None, first: int = 1) -> list[int]:
    """The bad steps."""
    pairs = enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), start=first)
    return [step for step, (loss, norm) in pairs if watched.judge(step, {"loss": loss, "grad_norm": norm})]


def test_the_limit_is_robust_and_at_least_three_medians() -> None:
    assert spike_limit([1.0] * 10, 20.0) == 3.0
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 5.0], 20.0) == 3.0 + 20.0
    assert spike_limit([1.0, 2.0, 3.0, 4.0, 1e9], 20.0) == 3.0 + 20.0, "one outlier moves nothing"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on(value: float) -> None:
    assert judge(guard(), [1.0, value, 1.0]) == [2]
    assert judge(guard(spike_mads=None), [1.0] * 3, [1.0, 1.0, value]) == [3]


def test_a_spike_is_bad_once_the_window_is_full() -> None:
    assert judge(guard(), [*CALM, 3.5]) == [9]
    assert judge(guard(), CALM, [1.0] * 8) == judge(guard(), [*CALM, 2.9]) == judge(guard(), [*CALM[:7], 3.5]) == []
    assert judge(guard(), [*CALM, 1.0], [*CALM, 3.5]) == [9]
    assert judge(guard(spike_mads=None), [*CALM, 1e9]) == judge(guard(spike_mads=1e9), [*CALM, 1e6]) == []


def test_bad_values_do_not_enter_the_window() -> None:
    watched = guard()
    assert judge(watched, [*CALM, *[4.0] * 50]) == list(range(9, 59))
    assert judge(watched, [1.0], first=59) == [] and watched.num_bad == 0


def test_too_many_bad_steps_in_a_row_are_a_divergence() -> None:
    watched = guard()
    for step, loss in enumerate([1.0, math.nan, 1.0, 1.0, math.nan, math.inf], start=1):
        watched.check(step, watched.judge(step, {"loss": loss, "grad_norm": 1.0}), num_rollbacks=1)
    with pytest.raises(
        DivergedError, match="steps 5 to 7 are bad, the last one because its grad_norm is nan"
    ) as caught:
        watched.check(7, watched.judge(7, {"loss": 1.0, "grad_norm": math.nan}), num_rollbacks=1)
    assert caught.value.skip == (3, 7) and caught.value.num_rollbacks == 1


def test_the_window_of_a_divergence_begins_with_the_run_at_the_earliest() -> None:
    watched = guard(rollback_steps=100, patience=1)
    with pytest.raises(DivergedError) as caught:
        watched.check(2, watched.judge(2, {"loss": math.nan, "grad_norm": 1.0}), num_rollbacks=0)
    assert caught.value.skip == (1, 2)


def test_a_restored_guard_decides_the_same() -> None:
    losses = [*CALM, 3.5, math.nan]
    watched, restored = guard(), guard()
    judge(watched, losses)
    restored.load_scalars(json.loads(json.dumps(watched.scalars(), allow_nan=False)))
    assert restored.scalars() == watched.scalars() and restored.num_bad == 2
    assert restored.judge(11, {"loss": 3.4, "grad_norm": 1.0}) == watched.judge(11, {"loss": 3.4, "grad_norm": 1.0})
    with pytest.raises(DivergedError) as caught:
        restored.check(11, "loss", 0)
    assert caught.value.skip == (7, 11)


@pytest.mark.parametrize(
    ("key", "value"), [("spike_mads", 0.0), ("window", 7), ("patience", 0), ("rollback_steps", -1)]
)
def test_impossible_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key}={value:g} must be"):
        DivergenceConfig(**{key: value})  # type: ignore[arg-type]


def test_exclusions_do_not_show_the_order_in_which_they_were_found() -> None:
    first, second = (
        Exclusions(steps=((5, 9),), samples=((3, 7),)),
        Exclusions(steps=((2, 11),), samples=((3, 4), (3, 7))),
    )
    both = first.merged(second)
    assert both == second.merged(first) == both.merged(first)
    assert both.steps == ((5, 9), (2, 11)) and both.samples == ((3, 4), (3, 7))
    assert [step for step in range(14) if both.skips(step)] == list(range(2, 12))
    assert both.left_out(2) == frozenset() and both.left_out(3) == {4, 7}
    assert Exclusions.from_scalars(json.loads(json.dumps(both.scalars()))) == both


def _poisoned(world_size: int, exclusions: Exclusions) -> tuple[list[dict[str, float]], list[dict[str, int]]]:
    """Four steps with a NaN in the second: numbers, and fingerprints after each."""
    state, task = build_tiny(tiny_config(divergence={"patience": 2}))
    state.exclusions = exclusions
    poison = sample_indices(7, np.array([24 + 13]), 1797).item()
    read = task.source._source.read

    def poisoned(indices: np.ndarray, crops: np.ndarray | None) -> Samples:
        samples = read(indices, crops)
        samples.images[torch.from_numpy(indices == poison)] = math.nan
        return samples

    task.source._source.read = poisoned  # type: ignore[method-assign]
    metrics, prints = [], []
    for _ in range(4):
        metrics.append(train_step(state, task))
        prints.append({name: value for name, value in fingerprints(state).items() if not name.startswith("rng")})
    assert state.optimizer_steps == 3 and state.progress.step == 4 and state.progress.samples_seen == 4 * 24
    assert state.ema.scalars()["slow"]["num_updates"] == 2
    return metrics, prints


def test_a_bad_step_leaves_weights_moments_and_averages_as_they_were() -> None:
    """The same at every world size; and as if the step had been left out from the start."""
    (metrics, prints), *_ = run_ranks(1, _poisoned, 1, Exclusions())
    assert [step.get("skipped") for step in metrics] == [None, 1.0, None, None] and math.isnan(metrics[1]["loss"])
    assert [step["lr"] for step in metrics] == [0.0, 5e-4, 1e-3, 1e-3], "its schedule goes on"
    assert prints[0] == {name: prints[1][name] for name in prints[0]}
    assert prints[1] != prints[2] != prints[3]
    for _, same in run_ranks(2, _poisoned, 2, Exclusions()):
        assert same == prints
    (numbers, skipped), *_ = run_ranks(1, _poisoned, 1, Exclusions(steps=((2, 2),)))
    assert skipped == prints and numbers[1] == {"skipped": 1.0} and numbers[2] == metrics[2]
