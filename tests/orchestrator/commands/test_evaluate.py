from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.config import RunConfig, to_dict
from tests.orchestrator.tiny_run import CONFIG, make_run, save
from tests.trainers.evaluation.test_metrics import save_network
from trainers.decode import decode
from trainers.models import build_model


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_network(tmp_path_factory.mktemp("network") / "means.pt2"))


def evaluate(run: str, network: str, *options: str) -> dict[str, Any]:
    result = unbroken("evaluate", run, "--network", network, "--num=5", "--num-steps=2", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_numbers_are_named_after_their_network(run: str, network: str) -> None:
    found = evaluate(run, network)
    kinds = {name.split("/")[0] for name in found["metrics"]}
    (name,) = {name.split("/")[1] for name in found["metrics"]}
    assert kinds == {"fid", "kid", "kid_std"} and name.startswith("means-")
    assert (found["step"], found["num_drawn"], found["num_real"]) == (10, 5, 5)
    assert found["weights"] == "EMA weights (slow) of step 10" and found["guidance"] == 1.5
    assert found["notes"] == ["fid of 5 images in 6 features is mostly bias; kid has none"]
    assert evaluate(run, network) == found, "same seed, same numbers"


def test_every_option_changes_the_numbers(run: str, network: str) -> None:
    plain = evaluate(run, network, "--metrics=kid")["metrics"]
    for option in ("--weights=raw", "--seed=1", "--guidance=3", "--num-steps=3", "--num=70"):
        assert evaluate(run, network, "--metrics=kid", option)["metrics"] != plain, option


def test_lines_for_people(run: str, network: str) -> None:
    result = unbroken("evaluate", run, "--network", network, "--num=5", "--num-steps=1", "--step=5")
    first, fid, *_ = result.stdout.splitlines()
    assert first == "EMA weights (slow) of step 5: 5 images against 5 of the data" and fid.startswith("fid/means-")


def test_a_broken_image_is_replaced_as_it_is_in_training(network: str, tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    args = {**CONFIG["model"]["args"], "in_channels": 3, "out_channels": 3, "num_class_embeds": None}
    data = {"source": "folder", "path": str(tmp_path), "image_size": 8, "on_broken": "skip"}
    plain = {**CONFIG, "model": {"class_name": "UNet2DModel", "args": args}, "data": data, "objective": {}}
    config, store = decode(RunConfig, plain), Store.open(str(tmp_path / "runs" / "tiny"))
    open_or_create(store, to_dict(config))
    weights = build_model(config.model, 0).named_parameters()
    save(store, 5, {f"model/{name}": parameter.detach() for name, parameter in weights})
    found = evaluate(store.url, network, "--num=6", "--weights=raw", "--metrics=kid")
    assert found["num_real"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics=fid,is"], "--metrics is is not known"),
        (["--metrics=clip"], "needs --clip"),
        (["--metrics=clip", "--clip=x"], "needs a model of text"),
        (["--network=absent.pt"], "absent.pt is neither inception nor the file"),
        (["--reference=held-out"], "this run holds no samples out"),
    ],
)
def test_refusals(run: str, network: str, options: list[str], message: str) -> None:
    result = unbroken("evaluate", run, "--num=2", "--network", network, *options)
    assert result.exit_code == 2 and message in result.stderr, result.stderr


def test_the_standard_network_is_asked_for_by_default(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainers.evaluation.metrics as metrics

    def absent() -> None:
        raise ModuleNotFoundError("torch_fidelity")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", lambda **_: absent())
    result = unbroken("evaluate", run, "--num=2")
    assert result.exit_code == 2 and "needs torch-fidelity" in result.stderr
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", lambda **_: _offline())
    result = unbroken("evaluate", run, "--num=2")
    assert result.exit_code == 2 and "can not be downloaded" in result.stderr and metrics.INCEPTION in result.stderr


def _offline() -> None:
    import urllib.error

    raise urllib.error.URLError("no network")
