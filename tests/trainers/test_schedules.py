from __future__ import annotations

import diffusers.optimization
import pytest
import torch

from trainers.errors import ConfigError
from trainers.schedules import ScheduleConfig, depends_on_num_steps, learning_rate


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {0: 2.0, 99: 2.0, 1000: 2.0}),
        ({"warmup_steps": 10}, {0: 0.0, 1: 0.2, 5: 1.0, 10: 2.0, 100: 2.0}),
        ({"kind": "linear"}, {0: 2.0, 25: 1.5, 100: 0.0, 120: 0.0}),
        ({"kind": "linear", "warmup_steps": 20, "end_factor": 0.5}, {10: 1.0, 20: 2.0, 60: 1.5, 100: 1.0}),
        ({"kind": "cosine", "end_factor": 0.1}, {0: 2.0, 50: 1.1, 100: 0.2}),
        ({"kind": "polynomial", "power": 2.0}, {0: 2.0, 50: 0.5, 100: 0.0}),
        ({"kind": "cosine_with_restarts", "num_cycles": 4}, {0: 2.0, 12.5: 1.0, 25: 2.0, 75: 2.0, 100: 0.0}),
        ({"kind": "linear", "warmup_steps": 100}, {50: 1.0, 99: 1.98, 100: 2.0}),
    ],
)
def test_table(config, expected):
    for step, lr in expected.items():
        assert learning_rate(ScheduleConfig(**config), 2.0, 100, step) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "name", "options"),
    [
        ({"warmup_steps": 7}, "constant_with_warmup", {}),
        ({"kind": "linear", "warmup_steps": 7}, "linear", {}),
        ({"kind": "cosine", "warmup_steps": 7}, "cosine", {}),
        (
            {"kind": "cosine_with_restarts", "num_cycles": 3, "warmup_steps": 7},
            "cosine_with_restarts",
            {"num_cycles": 3},
        ),
        ({"kind": "polynomial", "power": 3.0, "warmup_steps": 7, "end_factor": 0.01}, "polynomial", {"power": 3.0}),
    ],
)
def test_equals_diffusers(config, name, options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    if name == "polynomial":
        scheduler = diffusers.optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, 7, 50, lr_end=1e-5, **options
        )
    else:
        scheduler = diffusers.optimization.get_scheduler(
            name, optimizer, num_warmup_steps=7, num_training_steps=50, **options
        )
    for step in range(51):
        assert learning_rate(ScheduleConfig(**config), 1e-3, 50, step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("kind", "depends"),
    [("constant", False), ("linear", True), ("cosine", True), ("cosine_with_restarts", True), ("polynomial", True)],
)
def test_depends_on_num_steps(kind, depends):
    config = ScheduleConfig(kind=kind, warmup_steps=3)
    assert depends_on_num_steps(config) is depends
    rates = [[learning_rate(config, 1.0, num_steps, step) for step in range(50)] for num_steps in (50, 80)]
    assert (rates[0] != rates[1]) is depends


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"kind": "linear", "end_factor": 1.5}, "end_factor=1.5"),
        ({"kind": "polynomial", "power": 0.0}, "power=0.0"),
        ({"end_factor": 0.5}, "end_factor=0.5 has no effect"),
        ({"kind": "cosine", "power": 2.0}, "power=2.0 has no effect"),
        ({"kind": "cosine", "num_cycles": 2}, "num_cycles=2 has no effect"),
        ({"kind": "cosine_with_restarts", "num_cycles": 0}, "num_cycles=0 must be"),
    ],
)
def test_refusals(config, word):
    with pytest.raises(ConfigError, match=word):
        ScheduleConfig(**config)
