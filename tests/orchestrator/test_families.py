"""Every family of models, tiny: killed, resumed at another world size, proven, exported, and drawn from elsewhere."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.config import RunConfig
from orchestrator.coordination.failures import FailureConfig
from orchestrator.messages.attempts import Ending
from orchestrator.weights import open_model
from tests.orchestrator.agent_processes import PRELOAD, make_spec, run_agents
from tests.orchestrator.test_agents import Script
from tests.trainers.distributed import run_ranks
from tests.trainers.families import LABELS, PROMPTS, STEPS, all_families, draw_elsewhere, train_families
from tests.trainers.pipelines import FAMILIES
from trainers.decode import decode
from trainers.fingerprint import format_fingerprint
from trainers.models import ModelConfig, build_model
from trainers.objectives import Objective
from trainers.sampling import sample_images, sample_pipeline, sample_texts

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

NAMES = [*FAMILIES, "lora", "pixels", "text"]
RECOMPUTED = ("sdxl", "sd3", "lora")
"""Their second half keeps no activations: the same numbers."""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return all_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def straight(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What one process makes of them that nothing happens to."""
    return run_ranks(1, train_families, configs)[0]


@pytest.fixture(scope="module")
def runs(configs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family on two workers, killed for good in its second or third step, and finished by one."""
    folder = tmp_path_factory.mktemp("runs")
    # What any of them imports, so that all share two warm fork servers.
    classes = {cls for config in configs.values() for cls in decode(ModelConfig, config["model"]).classes()}
    preload = (*PRELOAD, "peft", *sorted(classes))
    for name, config in configs.items():
        open_or_create(Store.open(str(folder / name)), {**config, "run": {"name": name}})
        spec = replace(make_spec(folder / name, config, every_steps=1), preload=preload)
        script = Script(("saved", {"step": 1}, [0, 1]))
        outcome = run_agents(replace(spec, failures=FailureConfig(kills=1)), 2, script)
        assert outcome is not None and outcome.ending is Ending.GAVE_UP and script.done(), (name, outcome)
        if name in RECOMPUTED:
            spec = replace(spec, config={**config, "model": {**config["model"], "gradient_checkpointing": True}})
        outcome = run_agents(spec, 1, script := Script())
        assert outcome is not None and outcome.ending is Ending.FINISHED, (name, outcome)
        assert script.of("attempt")[0]["restore"] is not None
    return {name: folder / name for name in configs}


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_by_fewer_workers_it_is_bitwise_the_straight_run(
    straight: dict[str, Any], runs: dict[str, Path], name: str
) -> None:
    words, frozen, losses = straight[name]
    newest = newest_stable(Store.open(str(runs[name])))
    assert newest is not None and newest.manifest is not None
    manifest = newest.manifest
    assert (manifest.progress.step, manifest.world_size) == (STEPS, 1)
    assert {key: entry.fingerprint for key, entry in manifest.tensors.items()} == {
        key: format_fingerprint(word) for key, word in words.items()
    }
    assert any(key.startswith("ema/main/") for key in words) and len(set(losses)) == STEPS
    assert manifest.scalars.get("frozen", {}) == frozen
    assert ("vae" in frozen, "network" in frozen) == (name not in ("pixels", "text"), name == "lora")
    assert ("text_encoder" in frozen) == (name not in ("pixels", "dit"))


@pytest.fixture(scope="module")
def drawn(
    configs: dict[str, dict[str, Any]], runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images out of every run's averaged weights: by us, and by diffusers in another process from the export."""
    out, ours, folders = tmp_path_factory.mktemp("exports"), {}, {}
    for name, run in runs.items():
        cut = ("--fp16", "--max-shard-size", "20KB")
        result = unbroken("export", str(run), str(out / name), *cut)
        assert result.exit_code == 0, result.stderr
        base = configs[name]["model"].get("pretrained")
        folders[name] = f"{base}+{out / name}" if name == "lora" else str(out / name)
        ours[name] = draw(run)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_MODULES_CACHE", str(out / "modules"))
        process = multiprocessing.get_context("spawn").Process(target=draw_elsewhere, args=(folders, sender))
        process.start()
    assert receiver.poll(120), "the other process drew nothing"
    theirs = receiver.recv()
    process.join()
    return {name: (ours[name], torch.from_numpy(theirs[name]).permute(0, 3, 1, 2) * 2 - 1) for name in configs}


def draw(run: Path) -> torch.Tensor:
    """Two images, by our own sampling of the checkpoint."""
    saved = open_model(str(run))
    config: RunConfig = saved.config
    model = saved.load("ema")
    if config.model.pretrained is None:
        if config.data.captions:
            images = sample_texts(model, config, PROMPTS, guidance=1.5, num_steps=2)
        else:
            images = sample_images(model, Objective(config.objective), (2, 1, 8, 8), num_steps=2)
        return (images / 2 + 0.5) * 2 - 1  # as the pipeline rounds them
    if not config.data.captions:
        return sample_pipeline(model, config, LABELS, num_steps=2)
    return sample_pipeline(model, config, PROMPTS, guidance=1.5, num_steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_draws_the_same_from_the_export(
    drawn: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str
) -> None:
    ours, theirs = drawn[name]
    assert ours.shape == (2, 1, 8, 8) and ours.std() > 0.01
    assert not torch.equal(ours[0], ours[1])
    assert torch.equal(ours, theirs)


def test_a_single_file_is_trained_on_but_not_resumed(
    configs: dict[str, dict[str, Any]], runs: dict[str, Path], tmp_path: Path
) -> None:
    file, base = tmp_path / "sd15.safetensors", configs["sd15"]["model"]["pretrained"]
    assert unbroken("export", str(runs["sd15"]), str(file)).exit_code == 0
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["unbroken"])
    assert said["origin"].startswith("run sd15 (") and said["weights"]["description"] == "EMA weights (slow) of step 3"
    assert unbroken("unpack", str(file), str(tmp_path / "folder"), "--like", base).exit_code == 0
    tensors = dict(build_model(ModelConfig(pretrained=str(tmp_path / "folder")), seed=0).named_parameters())
    expected = open_model(str(runs["sd15"])).tensors("ema")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected) and tensors.keys() == expected.keys()
    assert unbroken("export", str(runs["sd15"]), str(tmp_path / "export")).exit_code == 0
    for export in (file, tmp_path / "export"):
        result = unbroken("resume", str(export), "--here")
        assert result.exit_code == 2 and "is an export: weights alone" in result.stderr


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)
