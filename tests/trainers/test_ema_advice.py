from __future__ import annotations

import pytest

from trainers.ema import EMAConfig
from trainers.ema_advice import advise, measure_update_s


@pytest.mark.parametrize("settings", [{"decay": 0.999}, {"half_life_samples": 5542}, {"num_steps": 1999}])
def test_one_average_in_three_units(settings):
    advice = advise(EMAConfig(**settings), 8, 100_000)
    assert advice.decay == pytest.approx(0.999, abs=1e-6)
    assert advice.half_life_steps == pytest.approx(692.8, abs=0.2)
    assert advice.half_life_samples == pytest.approx(5542, abs=2)
    assert advice.equivalent_num_steps == pytest.approx(1999, abs=1)


def test_the_last_steps_are_enough():
    late = advise(EMAConfig(decay=0.9999), 8, 1_400_000).latest_start_step
    assert late == 1_400_000 - 46_050
    share = advise(EMAConfig(decay=0.9999, start_step=late), 8, 1_400_000).share_of_start
    assert share <= 0.01 < share / 0.9999**2
    assert advise(EMAConfig(decay=0.9999), 8, 20_000).latest_start_step is None


def test_every_update_counts_for_the_steps_between():
    advice = advise(EMAConfig(decay=0.999, every=10, start_step=100), 8, 1100)
    assert advice.num_updates == 100 and advice.decay == pytest.approx(0.999)
    assert advice.share_of_start == pytest.approx(0.999**1000)


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        ({"kind": "warmup", "decay": 0.9999}, 101 / 110),
        ({"kind": "sma"}, 100 / 101),
        ({"kind": "power", "gamma": 2.0}, (100 / 101) ** 3),
    ],
)
def test_other_kinds_at_the_end_of_the_run(settings, decay):
    advice = advise(EMAConfig(**settings), 8, 101)
    assert advice.decay == pytest.approx(decay) and advice.latest_start_step is None


def test_a_profile_that_never_begins():
    advice = advise(EMAConfig(decay=0.9, start_step=50), 8, 40)
    assert (advice.decay, advice.half_life_steps, advice.num_updates) == (None, None, 0)


@pytest.mark.parametrize("settings", [{"num_steps": 1}, {"half_life_samples": 1}])
def test_an_average_that_forgets_at_once(settings):
    advice = advise(EMAConfig(**settings), 2048, 100)
    assert (advice.decay, advice.half_life_steps, advice.equivalent_num_steps) == (0.0, None, 1.0)
    assert advice.share_of_start == 0.0 and advice.latest_start_step == 99


@pytest.mark.parametrize("settings", [{"num_steps": 10**17}, {"half_life_samples": 10**18}])
def test_an_average_that_never_moves(settings):
    advice = advise(EMAConfig(**settings), 8, 100)
    assert (advice.decay, advice.half_life_steps, advice.equivalent_num_steps) == (1.0, None, None)
    assert advice.share_of_start == 1.0 and advice.latest_start_step is None


def test_time_grows_with_the_model():
    small, large = measure_update_s(1 << 22), measure_update_s(1 << 26)
    assert 0 < small < large
