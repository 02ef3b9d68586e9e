"""Metrics for operators, and the dashboard that shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from orchestrator.tracking import ray_metrics
from tests.orchestrator.tracking.made_up import attempt, event
from tests.s3.server import free_ports

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "deploy" / "grafana" / "unbroken.json"


class Recorded:
    """Takes the place of Ray's metrics, which need a cluster: remembers what was recorded."""

    every: ClassVar[dict[str, Recorded]] = {}
    suffixes = ("",)

    def __init__(self, name: str, description: str, *, tag_keys: tuple[str, ...], **_: object) -> None:
        self.values: list[float] = []
        self.tags: dict[str, str] = {}
        self.every[name] = self
        assert description.endswith(".") and tag_keys == ("run",)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def set(self, value: float) -> None:
        self.values.append(value)

    def inc(self) -> None:
        self.values.append(1.0)

    observe = set


class Counter(Recorded):
    suffixes = ("_total",)


class Histogram(Recorded):
    suffixes = ("_bucket", "_sum", "_count")


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    monkeypatch.setattr(Recorded, "every", {})
    for name, kind in (("Gauge", Recorded), ("Counter", Counter), ("Histogram", Histogram)):
        monkeypatch.setattr(ray_metrics, name, kind)
    return Recorded.every


def test_a_run_with_a_restart(metrics: dict[str, Recorded]) -> None:
    sink = ray_metrics.RayMetrics("story", 8)
    for one in [*attempt(1, 0, 10, save=5), event("save_failed", step=10, error="full"), *attempt(2, 5, 7)]:
        sink.take(one)
    values = {name.removeprefix("unbroken_"): metric.values for name, metric in metrics.items()}
    assert len(values["steps"]) == 12
    assert values["step"][-1] == 7 and values["restarts"] == [0, 1] and len(values["save_failures"]) == 1
    assert len(values["save_seconds"]) == 1 and 0 <= values["save_seconds"][0] < 1
    assert values["stable_lag_steps"][-1] == 2 and max(values["stable_lag_steps"]) == 5
    assert all(rate > 0 for rate in values["samples_per_second"]) and values["samples_per_second"]
    assert all(metric.tags == {"run": "story"} for metric in metrics.values())


def test_the_dashboard_names_exactly_these_metrics(metrics: dict[str, Recorded]) -> None:
    ray_metrics.RayMetrics("story", 8)
    exported = {f"ray_{name}{suffix}": name for name, metric in metrics.items() for suffix in metric.suffixes}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    shown = set(re.findall(r"ray_\w+", " ".join(queries)))
    assert shown <= set(exported), "the dashboard asks for something that does not exist"
    assert {exported[name] for name in shown} == set(metrics), "a metric is not on the dashboard"
    assert all('run=~"$run"' in query for panel in dashboard["panels"] for query in [panel["targets"][0]["expr"]])


_ON_RAY = """
import sys, time, urllib.request
import ray
from orchestrator.tracking.ray_metrics import RayMetrics
from tests.orchestrator.tracking.made_up import attempt

folder, port = sys.argv[1:]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
         _metrics_export_port=int(port), _temp_dir=folder, object_store_memory=100_000_000)
sink = RayMetrics("story", 8)
for event in attempt(1, 0, 10, save=5):
    sink.take(event)
for _ in range(120):
    time.sleep(0.5)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    names = {line.split("{")[0] for line in text.splitlines() if line.startswith("ray_unbroken")}
    if {"ray_unbroken_goodput", "ray_unbroken_save_seconds_bucket"} <= names:
        break
print(*sorted(names))
"""


@pytest.mark.ray
def test_ray_exports_what_the_dashboard_asks_for() -> None:
    folder = tempfile.mkdtemp(prefix="ub-", dir="/tmp")  # short, because it holds sockets
    (port,) = free_ports(1)
    settings = {"RAY_metrics_report_interval_ms": "200", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | settings
    command = [sys.executable, "-c", _ON_RAY, folder, str(port)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout
    shutil.rmtree(folder, ignore_errors=True)
    shown = set(re.findall(r"ray_unbroken_\w+", DASHBOARD.read_text()))
    assert shown - set(output.split()) == {"ray_unbroken_save_failures_total"}  # none has failed
