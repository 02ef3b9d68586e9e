from __future__ import annotations

import random

import numpy as np
import torch

from trainers.generators import GeneratorStates, settle


def draw() -> list[object]:
    normal = random.gauss(0, 1), float(np.random.standard_normal())  # both keep a second draw in their state
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), normal]


def test_what_is_captured_comes_back() -> None:
    draw()
    states = GeneratorStates()
    states.capture()
    expected = draw()
    assert draw() != expected
    states.apply()
    assert draw() == expected


def test_settling_forgets_what_was_drawn() -> None:
    settle(1, 2, 3)
    expected = draw()
    draw()
    settle(1, 2, 3)
    assert draw() == expected
    settle(1, 3, 3)
    assert draw() != expected


def test_sizes_do_not_change() -> None:
    states = GeneratorStates()
    before = {name: len(tensor) for name, tensor in states.tensors.items()}
    draw()
    states.capture()
    assert {name: len(tensor) for name, tensor in states.tensors.items()} == before
    assert all(tensor.dtype == torch.uint8 for tensor in states.tensors.values())
