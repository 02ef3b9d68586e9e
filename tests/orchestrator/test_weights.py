from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.errors import DamagedCheckpointError, RunNotFoundError
from orchestrator.weights import open_model
from tests.orchestrator.tiny_run import make_run, parameters
from trainers.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> str:
    return make_run(tmp_path)


@pytest.mark.parametrize(
    ("weights", "step", "seed"),
    [("raw", None, 10), ("raw", 5, 5), ("ema", None, 100), ("slow", 5, 100), ("late", None, 200)],
)
def test_the_weights_asked_for_are_read_bitwise(run: str, weights: str, step: int | None, seed: int):
    saved = open_model(run, step)
    loaded = dict(saved.load(weights).named_parameters())
    expected = parameters(seed)
    assert loaded.keys() == expected.keys() == saved.tensors(weights).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_weights_that_are_not_there_are_named(run: str):
    with pytest.raises(ConfigError, match=r"weights=fast are not in .*; give raw or slow or late"):
        open_model(run).tensors("fast")
    with pytest.raises(ConfigError, match="weights=late begin after step 9, this checkpoint is of step 5"):
        open_model(run, 5).tensors("late")
    with pytest.raises(ConfigError, match=r"step=7 has no checkpoint in .*; there are steps 5, 10"):
        open_model(run, 7)
    with pytest.raises(RunNotFoundError, match="no run at"):
        open_model(run + "-none")


def test_a_flipped_bit_is_never_loaded(run: str):
    (shard, *_) = sorted(Path(run).glob("checkpoints/0000000000080-0001/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # the last tensor of the file: EMA profile late
    shard.write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        open_model(run).load("late")
