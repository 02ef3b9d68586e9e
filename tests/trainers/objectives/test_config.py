from __future__ import annotations

import dataclasses

import pytest

from trainers.errors import ConfigError
from trainers.objectives.config import _ONLY_WITH, ObjectiveConfig


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000 must be 1 to 100000"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma=0\.0"),
        ({"label_drop": 1.5}, r"label_drop=1\.5"),
        ({"offset_noise": -0.1}, r"offset_noise=-0\.1"),
        ({"contrastive": 1.0, "prediction_type": "flow"}, r"contrastive=1\.0"),
        ({"beta_schedule": "linear", "beta_end": 0.00005}, "beta_end=5e-05 must be above beta_start=0.0001"),
        ({"beta_end": 0.012}, "beta_end=0.012 does not go with beta_schedule=squaredcos_cap_v2; it is for linear and"),
        ({"prediction_type": "flow", "beta_schedule": "linear"}, "beta_schedule=linear does not go with .*=flow"),
        ({"prediction_type": "edm", "num_train_timesteps": 500}, "num_train_timesteps=500 does not go with .*=edm"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr=true does not go with .*=epsilon; it is for v_prediction and"),
        ({"shift": 3.0}, "shift=3.0 does not go with prediction_type=epsilon; it is for flow"),
        ({"prediction_type": "flow", "logit_mean": 0.5}, "logit_mean=0.5 does not go with timestep_density=uniform"),
        ({"prediction_type": "flow", "timestep_density": "mode", "mode_scale": 2.0}, "mode_scale=2.0 must be"),
        ({"sigma_data": 1.0}, "sigma_data=1.0 does not go with prediction_type=epsilon; it is for edm"),
        ({"weighting": "cosmap"}, "weighting=cosmap does not go with prediction_type=epsilon; it is for flow"),
        ({"prediction_type": "edm", "weighting": "p2"}, "weighting=p2 does not go with prediction_type=edm"),
        ({"p2_gamma": 0.5}, "p2_gamma=0.5 does not go with weighting=none; it is for p2"),
        ({"prediction_type": "flow", "learned_variance": True}, "learned_variance=true does not go with .*=flow"),
        ({"vlb_weight": 0.01}, "vlb_weight=0.01 does not go with learned_variance=false; it is for true"),
        ({"learned_variance": True, "input_perturbation": 0.1}, "input_perturbation=0.1 does not go with learned_var"),
        ({"contrastive": 0.05}, "contrastive=0.05 does not go with prediction_type=epsilon; it is for flow"),
    ],
)
def test_refusals(settings, word):
    with pytest.raises(ConfigError, match=word):
        ObjectiveConfig(**settings)


def test_every_condition_names_keys_that_exist():
    names = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    assert names >= _ONLY_WITH.keys() | {other for other, _ in _ONLY_WITH.values()}
