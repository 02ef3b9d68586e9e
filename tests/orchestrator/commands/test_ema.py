from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.config import RunConfig, to_dict
from orchestrator.weights import open_model
from tests.orchestrator.tiny_run import CONFIG, parameters, save
from trainers.decode import decode
from trainers.ema import EMA

POWER = {
    "narrow": {"kind": "power", "sigma_rel": 0.05, "start_step": 3},
    "wide": {"kind": "power", "gamma": 6.937203937601809, "start_step": 3},
}
DIRECT = {f"direct{sigma}": {"kind": "power", "sigma_rel": sigma, "start_step": 3} for sigma in (0.07, 0.12)}
STEPS, EVERY = 480, 60


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def make_run(
    folder: Path, profiles: dict[str, Any], steps: int = STEPS
) -> tuple[str, dict[str, dict[str, torch.Tensor]]]:
    """A run whose weights walk at random, and what its averages are at the end, by profile."""
    config = decode(RunConfig, {**CONFIG, "ema": {**profiles, **DIRECT}})
    store = Store.open(str(folder / "tiny"))
    open_or_create(store, to_dict(decode(RunConfig, {**CONFIG, "ema": profiles})))
    weights = {name: tensor.clone() for name, tensor in parameters(0).items()}
    ema = EMA(config.ema, weights, 8)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        for tensor in weights.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
        ema.update(step)
        if step % EVERY == 0:
            averages = {name: tensors for name, tensors in ema.tensors().items() if name in profiles}
            tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
            for profile, average in averages.items():
                tensors |= {f"ema/{profile}/{name}": tensor for name, tensor in average.items()}
            save(store, step, tensors, {"ema": {name: ema.scalars()[name] for name in profiles}})
    return store.url, ema.tensors()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    return make_run(tmp_path_factory.mktemp("run"), POWER)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    square = sum((found[name] - wanted[name]).square().sum().item() for name in wanted)
    return (square / sum(tensor.square().sum().item() for tensor in wanted.values())) ** 0.5


@pytest.mark.parametrize("sigma_rel", ["0.07", "0.12"])
def test_the_written_file_is_the_average_computed_directly(run, tmp_path: Path, sigma_rel: str):
    url, direct = run
    result = unbroken("ema", "synthesize", url, "--sigma-rel", sigma_rel, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    path = tmp_path / "out/model.safetensors"
    assert result.stdout.startswith(f"{path}: EMA of sigma_rel {sigma_rel} at step {STEPS}, from 16 averages of 8 ")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert distance(load_file(path), direct[f"direct{sigma_rel}"]) < 1e-2
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["sigma_rel"], metadata["step"], metadata["run_id"]) == (sigma_rel, str(STEPS), "0123456789ab")
    assert float(metadata["residual"]) < 0.03
    again = unbroken("ema", "synthesize", url, "--sigma-rel", sigma_rel, "--out", str(tmp_path / "out"))
    assert again.exit_code == 2 and "exists" in again.stderr


def test_a_stored_profile_comes_back_as_it_was(run):
    url, direct = run
    assert distance(open_model(url).tensors("sigma_rel=0.05"), direct["narrow"]) < 1e-5


def test_sample_and_export_take_the_same_average(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url, _ = run
    monkeypatch.chdir(tmp_path)
    options = ("--sigma-rel", "0.1", "--at", "240")
    assert unbroken("ema", "synthesize", url, *options).exit_code == 0
    written = load_file(tmp_path / "ema-0.1-240/model.safetensors")
    result = unbroken("export", url, str(tmp_path / "model"), "--weights", "sigma_rel=0.1", "--step", "240")
    assert result.exit_code == 0 and "post-hoc EMA weights (sigma_rel=0.1) of step 240" in result.stdout, result.stderr
    exported = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in written.items())
    result = unbroken("sample", url, str(tmp_path / "a.png"), "--num", "1", "--weights", "sigma_rel=0.1")
    assert result.exit_code == 0 and "post-hoc EMA weights (sigma_rel=0.1)" in result.stdout, result.stderr


def test_large_models_are_combined_group_by_group(run, monkeypatch: pytest.MonkeyPatch):
    url, _ = run
    at_once = open_model(url).tensors("sigma_rel=0.1")
    monkeypatch.setattr("orchestrator.ema_synthesis._GROUP_BYTES", 1000)
    in_groups = open_model(url).tensors("sigma_rel=0.1")
    assert all(torch.equal(in_groups[name], tensor) for name, tensor in at_once.items())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--sigma-rel", "0.3"], "sigma_rel=0.3 must be at least 1e-09 and below 1 / sqrt(12) = 0.2886"),
        (["--sigma-rel", "1e-200"], "sigma_rel=1e-200 must be at least 1e-09"),
        (["--sigma-rel", "0.1", "--at", "61"], "step=61 has no checkpoint"),
    ],
)
def test_refusals(run, options, word):
    result = unbroken("ema", "synthesize", run[0], *options)
    assert result.exit_code == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_run_without_power_profiles_is_told_what_to_do(tmp_path: Path):
    url, _ = make_run(tmp_path / "a", {"main": {"decay": 0.9}}, EVERY)
    result = unbroken("ema", "synthesize", url, "--sigma-rel", "0.1")
    assert result.exit_code == 2 and "has no EMA profile of kind=power" in result.stderr


def test_profiles_with_other_clocks_do_not_go_together(tmp_path: Path):
    profiles = {**POWER, "wide": {**POWER["wide"], "every": 2}}
    url, _ = make_run(tmp_path / "b", profiles, EVERY)
    result = unbroken("ema", "synthesize", url, "--sigma-rel", "0.1")
    assert result.exit_code == 2 and "narrow, wide" in result.stderr and "differ in start_step" in result.stderr


DIGITS = "configs/digits.yaml"


def test_advise_explains_every_profile():
    result = unbroken("ema", "advise", DIGITS, "ema.x.decay=0.9", "ema.late.decay=0.9", "ema.late.start_step=999")
    assert result.exit_code == 0, result.stderr
    cost, warm, constant, late = result.stdout.splitlines()
    assert cost.startswith("each profile: 1.3 MB a worker, and 0.")
    assert warm.startswith("main (warmup): decay 0.97")
    assert constant.startswith("x (constant): decay 0.9 a step = half-life 6.57881 steps (1684.18 samples) = N 19 at")
    assert "start_step=256 would do as well" in constant
    assert late == "late (constant): never updated in 300 steps; lower start_step or every"


def test_advise_in_json():
    result = unbroken("ema", "advise", DIGITS, "ema.x.decay=0.9", "workers=1", "--json")
    content = json.loads(result.stdout)
    assert content["memory_bytes_per_worker"] == pytest.approx(2.6e6, rel=0.05) and content["update_s"] > 0
    assert content["profiles"]["x"]["equivalent_num_steps"] == pytest.approx(19)
