from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from orchestrator import doctor
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.config import load_config
from tests.orchestrator.checkpoint.test_probe import Overwriting
from tests.orchestrator.test_cli import CONFIG
from tests.s3.fault_proxy import Fault, Kind
from trainers.build import build
from trainers.state import TrainState

EVERYTHING = ["model", "memory", "disk", "storage", "create-if-absent", "write", "read"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


def examine(*args: str) -> tuple[int, dict[str, tuple[str, str]]]:
    result = CliRunner().invoke(main, ["doctor", *args, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, {one["name"]: (one["verdict"], one["detail"]) for one in json.loads(result.stdout)}


def test_a_healthy_folder(config):
    code, checks = examine(config)
    assert code == 0 and list(checks) == EVERYTHING
    assert {verdict for verdict, _ in checks.values()} == {"ok"}
    assert os.listdir("runs") == []  # nothing is left behind


def test_the_lines_are_for_people(config):
    result = CliRunner().invoke(main, ["doctor", config])
    assert result.exit_code == 0
    assert result.stdout.startswith("ok    model               ")
    assert len(result.stdout.splitlines()) == len(EVERYTHING)


def test_the_size_is_that_of_the_state(config):
    loaded = load_config(config)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        state, _ = build(loaded, torch.device("cpu"))
        expected = _bytes(state) + _bytes_of_averages(state, loaded)
    finally:
        torch.distributed.destroy_process_group()
    assert doctor.state_size(loaded).total == expected


def _bytes(state: TrainState) -> int:
    return sum(
        local.tensor.numel() * local.tensor.element_size()
        for local in state.tensors()
        if not local.spec.name.startswith(("ema/", "rng/"))
    )


def _bytes_of_averages(state: TrainState, config) -> int:
    """Averages get their memory when they begin."""
    return len(config.ema) * sum(p.local.numel() * p.local.element_size() for p in state.parameters)


def test_a_config_that_cannot_run_is_told_first(config):
    result = CliRunner().invoke(main, ["doctor", config, "model.args.out_channels=3"])
    assert result.exit_code == 2 and "cannot take images" in result.stderr


def test_a_storage_that_cannot_be_used_fails(config):
    Path("runs").write_text("in the way")
    code, checks = examine(config)
    assert code == 5 and checks["storage"][0] == "fail" and "a file is in the way; remove it" in checks["storage"][1]


def test_too_little_disk_and_memory(config, monkeypatch):
    monkeypatch.setattr(Store, "free_bytes", lambda store: 1000)
    monkeypatch.setattr(doctor, "_available_memory", lambda: 1000)
    code, checks = examine(config)
    assert code == 5 and checks["disk"][0] == "fail" and checks["memory"][0] == "warn"


def test_no_create_if_absent_is_a_warning(config, monkeypatch):
    monkeypatch.setattr(Store, "open", lambda url, deadline_s: Store("memory://x", "/doctor", Overwriting()))
    code, checks = examine(config)
    assert code == 0 and checks["create-if-absent"][0] == "warn"


@pytest.mark.s3
class TestS3:
    def test_healthy(self, config, s3_url):
        code, checks = examine(config, f"storage={s3_url}")
        assert code == 0 and [*checks] == ["model", "memory", "storage", "create-if-absent", "clock", "write", "read"]
        assert checks["clock"] == ("ok", checks["clock"][1])
        assert Store.open(s3_url).list("") == []

    def test_a_clock_that_is_far_off(self, config, s3_url, monkeypatch):
        real = doctor.time.time
        monkeypatch.setattr("orchestrator.checkpoint.s3_objects.time.time", lambda: real() + 300)
        _, checks = examine(config, f"storage={s3_url}")
        assert checks["clock"][0] == "warn" and "-300 s" in checks["clock"][1].replace("-299", "-300")

    def test_no_bucket(self, config, s3_url):
        code, checks = examine(config, "storage=s3://no-such-bucket/runs")
        assert code == 5 and "the bucket does not exist; create it" in checks["storage"][1]

    def test_denied(self, config, s3_proxy):
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, match="PUT", status=403, code="AccessDenied", count=9)]
        code, checks = examine(config, "storage=s3://tests/denied")
        assert code == 5 and "permission denied" in checks["storage"][1] and s3_proxy.fired(Kind.ANSWER) >= 1
