from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main
from tests.orchestrator.tiny_run import make_run
from tests.trainers.evaluation.test_metrics import save_network


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
