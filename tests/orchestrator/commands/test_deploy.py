from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli import main
from tests.deploy.conftest import ROOT

CONFIG = str(ROOT / "configs/digits.yaml")


def render(*args: str) -> Result:
    return CliRunner().invoke(main, ["deploy", "render", *args])


def test_it_writes_files_whose_figures_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = render(
        "kuberay", CONFIG, "storage=s3://b/r", "workers={min: 1, max: 3}", "deploy.grace_s=40", "--with", "spot"
    )
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "deploy-digits/kuberay"
    assert f"{folder.relative_to(tmp_path)}/base/rayjob.yaml" in result.stdout.splitlines()
    spec = yaml.safe_load((folder / "base/rayjob.yaml").read_text())["spec"]
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 3)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 40
    assert group["template"]["spec"]["containers"][0]["env"][0] == {"name": "DRAIN_S", "value": "35"}
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}}
    assert yaml.safe_load((folder / "kustomization.yaml").read_text())["components"] == [
        "components/autoscaling",
        "components/spot",
    ]
    assert yaml.safe_load((folder / "base/config.yaml").read_text())["storage"] == "s3://b/r"
    assert "exists; remove it" in render("kuberay", CONFIG, "storage=s3://b/r").stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["helm", CONFIG], "'helm' is no target; give one of aws, compose, kuberay"),
        (["slurm", CONFIG, "--with", "spot"], "'spot' is for kuberay, not for slurm"),
        (["kuberay", CONFIG, "--with", "sport"], "'sport' is no component"),
        (["kuberay", CONFIG], "storage=runs is local to one machine"),
        (["slurm", CONFIG, "storage=s3://b/r", "deploy.grace_s=3"], "deploy.grace_s=3 is shorter than a save"),
        (["slurm", CONFIG, "storage=s3://b/r", "deploy.grace=3"], "did you mean deploy.grace_s?"),
        (["slurm", "none.yaml"], "none.yaml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, args: list[str], message: str):
    result = render(*args, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
