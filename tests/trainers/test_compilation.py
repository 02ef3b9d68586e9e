from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import DIT, UNET, tiny_config, train_tiny
from trainers import compilation
from trainers.compilation import compile_blocks
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.models import ModelConfig, build_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torchs_own_settings():
    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    with config.patch({name: getattr(config, name) for name in names}):  # put back afterwards
        yield


def dit() -> nn.Module:
    return build_model(decode(ModelConfig, {**DIT, "args": {**DIT["args"], "dropout": 0.0}}), seed=0)


def call(model: nn.Module) -> torch.Tensor:
    labels = torch.zeros(1, dtype=torch.long)
    return model(torch.zeros(1, 1, 8, 8), timestep=torch.zeros(1), class_labels=labels, return_dict=False)[0]


def test_blocks_are_compiled_in_training_and_left_alone_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def compile(function: Any, **settings: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(settings)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    model = dit().eval()
    names = list(model.state_dict())
    before = call(model)
    compile_blocks(model, CPU)
    with torch.no_grad():
        assert torch.equal(call(model), before) and not calls
    assert torch.equal(call(model), before)
    assert [(call["fullgraph"], call["dynamic"]) for call in calls] == [(True, False)]
    assert calls[0]["options"] == {"deterministic": True, "compile_threads": 1}
    assert list(model.state_dict()) == names
    assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_what_torch_is_told_is_known_to_it() -> None:
    assert set(compilation._OPTIONS) <= torch._inductor.config.get_config_copy().keys()


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"model\.compile=true needs .*; install it"):
        compile_blocks(dit(), CPU)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"model\.compile=max-autotune .*noise would decide numbers"):
        decode(TrainerConfig, tiny_config({**UNET, "compile": "max-autotune"}))
    data = {"source": "folder", "path": "x", "image_size": 64, "buckets": {}}
    with pytest.raises(ConfigError, match=r"model\.compile=true .* data\.buckets"):
        decode(TrainerConfig, tiny_config({**UNET, "compile": True}, data=data))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("UNBROKEN_TEST_LONG" not in os.environ, reason="takes minutes: UNBROKEN_TEST_LONG=1")
@pytest.mark.parametrize("model", [DIT, UNET], ids=["dit", "unet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_result_for_every_layout(model: dict[str, Any], precision: str) -> None:
    """With dropout inside the blocks; and near what comes of it without."""
    objective = {"prediction_type": "flow", "weighting": "none", "label_drop": 0.0}
    config = tiny_config({**model, "compile": True}, objective=objective, train={"precision": precision})
    config["schedule"]["warmup_steps"] = 0  # a DiT's blocks get gradients from the third update on only
    metrics, tensors = run_ranks(1, train_tiny, config, 4, timeout_s=900)[0]
    for world_size, strategy in ((2, "fsdp"), (2, "ddp"), (3, "fsdp")):
        other = {**config, "parallel": {"strategy": strategy}}
        for found in run_ranks(world_size, train_tiny, other, 4, timeout_s=900):
            assert found == (metrics, tensors)
    eager, _ = run_ranks(1, train_tiny, {**config, "model": model}, 4)[0]
    for ours, theirs in zip(metrics, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # other kernels, and other dropout
