from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from orchestrator.cli import main
from tests.orchestrator.tiny_run import make_run, parameters


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("run"))


def sample(run: str, out: Path, *options: str) -> np.ndarray:
    """The picture that `unbroken sample` writes, (H, W, 3) uint8."""
    result = unbroken("sample", run, str(out), *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{out}: ")
    with Image.open(out) as picture:
        return np.asarray(picture)


def test_sample_draws_from_the_weights_asked_for(run: str, tmp_path: Path):
    pictures = {
        weights: sample(run, tmp_path / f"new/{weights}.png", "--weights", weights, "--num", "2")
        for weights in ("ema", "slow", "raw")
    }
    assert np.array_equal(pictures["ema"], pictures["slow"])
    assert not np.array_equal(pictures["ema"], pictures["raw"])


def test_sample_has_a_column_for_each_class(run: str, tmp_path: Path):
    one_row = sample(run, tmp_path / "a.png", "--num", "10")
    two_rows = sample(run, tmp_path / "b.png", "--num", "20")
    assert two_rows.shape[1] == one_row.shape[1] > 10 * 64  # ten classes, images enlarged to 64 pixels
    assert two_rows.shape[0] > one_row.shape[0]


def test_every_option_of_sample_changes_the_picture(run: str, tmp_path: Path):
    options = ("--num=2", "--weights=raw")
    plain = sample(run, tmp_path / "plain.png", *options)
    for option in ("--seed=1", "--guidance=3", "--step=5"):
        assert not np.array_equal(sample(run, tmp_path / "a.png", *options, option), plain), option


@pytest.mark.parametrize(
    ("weights", "default", "variants"), [("both", 100, ["non_ema"]), ("ema", 100, []), ("raw", 10, [])]
)
def test_export_is_what_diffusers_loads(run: str, tmp_path: Path, weights: str, default: int, variants: list[str]):
    from diffusers import UNet2DModel

    out = tmp_path / "exported"
    result = unbroken("export", run, str(out), "--weights", weights)
    assert result.exit_code == 0, result.stderr
    seeds: list[tuple[str | None, int]] = [(None, default), *((variant, 10) for variant in variants)]
    for variant, seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers warns about packages that this test does not need
            model = UNet2DModel.from_pretrained(out / "unet", variant=variant)
        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in parameters(seed).items())
    assert not weights == "both" or (out / "unet/diffusion_pytorch_model.non_ema.safetensors").exists()


def test_export_replaces_nothing(run: str, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    result = unbroken("export", run, str(tmp_path / "full"))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["file"]


def test_a_single_file_is_for_pipelines(run: str, tmp_path: Path):
    for options, words in (
        ((), "has no form for a model without a pipeline"),
        (("--max-shard-size=1GB",), "no effect"),
    ):
        result = unbroken("export", run, str(tmp_path / "a.safetensors"), *options)
        assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("args", [["sample", "/proc/none/grid.png", "--num", "1"], ["export", "/proc/none"]])
def test_a_place_that_cannot_be_written_is_no_bug_of_ours(run: str, args: list[str]):
    result = unbroken(args[0], run, *args[1:])
    assert result.exit_code == 2 and "cannot write to /proc/none" in result.stderr
    assert len(result.stderr.splitlines()) == 1
