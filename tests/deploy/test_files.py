"""Every file in `deploy/` is what rendering gives, is valid, and a broken copy is noticed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from orchestrator.config import load_config
from orchestrator.deploy.plan import COMPONENTS
from orchestrator.deploy.render import FILES, render
from tests.deploy import kubernetes, validators
from tests.deploy.conftest import ROOT, example

CORE = sorted(
    path.relative_to(FILES)
    for path in (FILES / "kuberay/components").rglob("*.yaml")
    if path.name != "kustomization.yaml"
)
SCRIPTS = ("slurm/train.sbatch", "aws/drain-on-notice", "unbroken-job")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, whose kustomize is needed")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")


def kustomize(folder: Path, *components: str) -> str:
    """The documents of a rendered `kuberay` folder with other components."""
    if components:
        path = folder / "kustomization.yaml"
        lines = [line for line in path.read_text().splitlines() if not line.startswith("components:")]
        path.write_text("\n".join([*lines, f"components: [{', '.join(f'components/{name}' for name in components)}]"]))
    result = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_file_is_what_rendering_the_example_gives(rendered: Path):
    seen = set()
    for path in (path for path in rendered.rglob("*") if path.is_file()):
        file = Path(*(part for part in path.relative_to(rendered).parts if part != "elsewhere"))
        if path.name != "config.yaml":
            assert path.read_text() == (FILES / file).read_text(), file
            assert path.stat().st_mode == (FILES / file).stat().st_mode
        elif (FILES / file).exists():  # where a tool needs one; a new key may be missing in it
            assert load_config(FILES / file) == load_config(path)
        seen.add(file)
    by_hand = {"Dockerfile", "Dockerfile.dockerignore", "README.md", "unbroken-job"}
    shipped = {path.relative_to(FILES) for path in FILES.rglob("*") if path.is_file()}
    assert {str(file) for file in shipped - seen} == by_hand


def test_base_and_core_kinds_are_valid(rendered: Path):
    job = (rendered / "kuberay/base/rayjob.yaml").read_text()
    assert kubernetes.problems(job) == []
    for file in CORE:
        assert kubernetes.problems((rendered / file).read_text()) == [], file


@needs_kubectl
@pytest.mark.parametrize(
    "components",
    [
        (),
        ("autoscaling", "spot", "s3-role", "token-auth"),
        ("kueue", "s3-secret", "gcs-fault-tolerance", "prometheus", "retention", "token-auth"),
    ],
    ids=lambda names: "+".join(names) or "as rendered",
)
def test_every_component_gives_valid_manifests(rendered: Path, tmp_path: Path, components: tuple[str, ...]):
    shutil.copytree(rendered / "kuberay", tmp_path / "kuberay")
    text = kustomize(tmp_path / "kuberay", *components)
    assert kubernetes.problems(text) == []
    documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert "storage: s3://my-bucket/runs" in documents["ConfigMap"]["data"]["config.yaml"]
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert cluster.get("enableInTreeAutoscaling", False) == ("kueue" not in components)
    assert ("tolerations" in worker) == ("kueue" not in components)
    assert documents["RayJob"]["spec"].get("suspend", False) == ("kueue" in components)
    assert cluster["authOptions"] == {"mode": "token"} or not components
    assert len(worker["containers"][0]["envFrom"]) == (2 if "s3-secret" in components else 1)
    if "retention" in components:
        assert {"CronJob", "StatefulSet", "Service", "PodMonitor"} <= set(documents)


def test_there_is_a_folder_for_each_component():
    assert {path.name for path in (FILES / "kuberay/components").iterdir()} == {*COMPONENTS, "autoscaling"}


def test_the_other_files_are_valid(rendered: Path):
    assert validators.dockerfile(FILES / "Dockerfile", ROOT) == []
    for script in SCRIPTS:
        assert validators.shell(FILES / script) == [], script
    assert validators.ray_up(rendered / "aws/cluster.yaml") == []
    assert validators.compose(rendered / "compose/compose.yaml") == []
    assert validators.skypilot(rendered / "skypilot/task.yaml") == []
    assert validators.prometheus(FILES / "monitoring/prometheus.yaml") == []
    assert validators.policy(rendered / "s3/bucket-policy.json") == []
    assert validators.policy(rendered / "elsewhere/s3/bucket-policy-retention-elsewhere.json") == []


def test_scripts_inside_other_files_are_sound(rendered: Path, tmp_path: Path):
    run = yaml.safe_load((rendered / "skypilot/task.yaml").read_text())["run"]
    (tmp_path / "run").write_text(f"#!/usr/bin/env bash\n{run}")
    worker = yaml.safe_load((rendered / "kuberay/base/rayjob.yaml").read_text())["spec"]["rayClusterSpec"][
        "workerGroupSpecs"
    ][0]["template"]["spec"]["containers"][0]
    (tmp_path / "stop").write_text(f"#!/usr/bin/env bash\n{worker['lifecycle']['preStop']['exec']['command'][2]}\n")
    assert validators.shell(tmp_path / "run") == []
    assert validators.shell(tmp_path / "stop") == []


def test_only_retention_may_delete_where_retention_is_elsewhere():
    runs = "arn:aws:s3:::my-bucket/runs"
    assert validators.deleters(FILES / "s3/bucket-policy.json") == {"unbroken-trainer": [f"{runs}/*"]}
    assert validators.deleters(FILES / "s3/bucket-policy-retention-elsewhere.json") == {
        "unbroken-trainer": [f"{runs}/*.probe-*"],
        "unbroken-retention": [f"{runs}/*/checkpoints/*"],
    }


@needs_systemd
def test_units_are_valid(rendered: Path, tmp_path: Path):
    assert validators.systemd(rendered / "systemd", tmp_path) == []


def test_no_secret_is_in_any_file():
    for path in (path for path in FILES.rglob("*") if path.is_file()):
        for line in path.read_text().splitlines():
            name, sign, value = line.strip().removeprefix("- ").partition("=" if ".y" not in path.suffix else ": ")
            if sign and name.isupper() and name.endswith(("KEY", "SECRET", "TOKEN", "PASSWORD")):
                assert value.strip('"').startswith(("$", "null")), f"{path}: {line}"


BROKEN: list[tuple[str, str, str, str]] = [
    ("kuberay/base/rayjob.yaml", "backoffLimit: 100", "backofLimit: 100", "backofLimit"),
    ("kuberay/base/rayjob.yaml", "backoffLimit: 100", "backoffLimit: -1", "negative"),
    ("kuberay/base/rayjob.yaml", "backoffLimit: 100", 'backoffLimit: "100"', "not of type 'integer'"),
    ("kuberay/base/rayjob.yaml", "minReplicas: 2", "minReplicas: 3", "between minReplicas and maxReplicas"),
    ("kuberay/base/rayjob.yaml", "name: digits", "name: Digits_2", "DNS-1035"),
    ("kuberay/base/rayjob.yaml", "K8sJobMode", "K8JobMode", "submissionMode"),
    ("kuberay/base/rayjob.yaml", "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "ttlSeconds"),
    ("kuberay/base/rayjob.yaml", "{name: shm, emptyDir", "{name: shn, emptyDir", "no volume shm"),
    ("kuberay/base/rayjob.yaml", 'value: "55"', 'value: "60"', "not inside the grace"),
    ("kuberay/base/rayjob.yaml", "terminationGracePeriodSeconds: 60", "terminationGraceSeconds: 60", "GraceSeconds"),
    ("kuberay/components/gcs-fault-tolerance/redis.yaml", "port: 6379}", "prot: 6379}", "'port' is a required"),
    ("kuberay/components/retention/cronjob.yaml", "onExitCodes", "onExitCode", "onExitCode"),
    ("kuberay/components/s3-role/serviceaccount.yaml", "apiVersion: v1", "apiVersion: v2", "v2"),
    ("kuberay/components/prometheus/podmonitor.yaml", "interval: 15s", "interval: 15", "15"),
    ("slurm/train.sbatch", 'rm -rf "$FOLDER"', "rm -rf $FOLDER", "SC2086"),
    ("aws/drain-on-notice", "asked=$SECONDS\nwhile", "asked=$SECONDS\nwhil", "SC"),
    ("aws/cluster.yaml", "idle_timeout_minutes", "idle_timeout", "idle_timeout"),
    ("aws/cluster.yaml", "head_node_type: head", "head_node_type: haed", "head_node_type"),
    ("aws/cluster.yaml", "    min_workers: 2", "    min_workers: 5", "max_workers"),
    ("aws/cluster.yaml", "./drain-on-notice", "./drain", "does not exist"),
    ("compose/compose.yaml", "stop_grace_period", "stop_grace", "stop_grace"),
    ("compose/compose.yaml", "head: {condition", "haed: {condition", "waits for haed"),
    ("compose/compose.yaml", "./config.yaml:", "./conf.yaml:", "does not exist"),
    ("skypilot/task.yaml", "num_nodes", "num_node", "num_node"),
    ("skypilot/task.yaml", "use_spot", "use_spots", "use_spots"),
    ("skypilot/task.yaml", "[3, 5]", "[3, 500]", "500"),
    ("monitoring/prometheus.yaml", "dns_sd_configs", "dns_sd_config", "dns_sd_config"),
    ("s3/bucket-policy.json", '"s3:PutObject"', '"s3:*"', "s3:* is not needed"),
    ("s3/bucket-policy.json", ":::my-bucket/runs", ":::my-buckets/runs", "buckets"),
    ("s3/bucket-policy.json", '"false"', '"true"', "unencrypted"),
]
CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "kuberay": lambda path: kubernetes.problems(path.read_text()),
    "slurm": validators.shell,
    "cluster.yaml": validators.ray_up,
    "drain-on-notice": validators.shell,
    "compose": validators.compose,
    "skypilot": validators.skypilot,
    "monitoring": validators.prometheus,
    "s3": validators.policy,
}


@pytest.mark.parametrize(("file", "old", "new", "expected"), BROKEN, ids=lambda text: text[:30])
def test_a_broken_copy_is_noticed(rendered: Path, tmp_path: Path, file: str, old: str, new: str, expected: str):
    folder, name = file.split("/")[0], file.rsplit("/")[-1]
    shutil.copytree(rendered / folder, tmp_path / folder)
    for beside in ("monitoring", "grafana"):
        if (rendered / beside).exists():
            shutil.copytree(rendered / beside, tmp_path / beside, dirs_exist_ok=True)
    path = tmp_path / file
    check = CHECKS.get(name) or CHECKS[folder]
    assert check(path) == []
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert expected in "\n".join(check(path))


def test_a_broken_dockerfile_is_noticed(tmp_path: Path):
    shutil.copy(FILES / "Dockerfile.dockerignore", tmp_path)
    text = (FILES / "Dockerfile").read_text()
    for old, new, expected in (
        ("USER 1000", "USER root", "DL3002"),
        ("COPY configs", "COPY config", "no such file"),
        ("COPY configs", "COPY bench", "left out"),
        ("lora,", "rola,", "no such extra: rola"),
        ('CMD ["unbroken", "--help"]', "CMD unbroken --help", "DL3025"),
    ):
        (tmp_path / "Dockerfile").write_text(text.replace(old, new))
        assert expected in "\n".join(validators.dockerfile(tmp_path / "Dockerfile", ROOT))


@needs_systemd
def test_a_broken_unit_is_noticed(tmp_path: Path):
    for old, new in (("RestartPreventExitStatus=2 4 6", "RestartPreventExitStatus=2 four"), ("KillMode", "KillMod")):
        shutil.rmtree(tmp_path / "units", ignore_errors=True)
        shutil.copytree(FILES / "systemd", tmp_path / "units")
        unit = tmp_path / "units/unbroken.service"
        unit.write_text(unit.read_text().replace(old, new))
        assert "unbroken.service" in "\n".join(validators.systemd(tmp_path / "units", tmp_path))


@needs_kubectl
def test_contradictory_components_are_noticed(rendered: Path, tmp_path: Path):
    shutil.copytree(rendered / "kuberay", tmp_path / "kuberay")
    text = kustomize(tmp_path / "kuberay", "kueue", "autoscaling")
    assert kubernetes.problems(text) == ["Kueue takes no job with an autoscaler"]


def test_an_image_for_a_gpu_asks_for_it(tmp_path: Path):
    config = example("kuberay", "resources.gpu=1", "deploy.workers_per_node=2", "deploy.image=r.io/u@sha256:ab")
    render(config, "kuberay", tmp_path)
    job = yaml.safe_load((tmp_path / "kuberay/base/rayjob.yaml").read_text())
    assert kubernetes.document_problems(job) == []
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"], group["rayStartParams"]["num-gpus"]) == (1, 2, "2")
    container = group["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2" and container["image"] == "r.io/u@sha256:ab"
