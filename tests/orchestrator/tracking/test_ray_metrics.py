"""Metrics for operators, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest

from orchestrator.tracking import ray_metrics
from tests.orchestrator.tracking.made_up import attempt, event

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "unbroken.json"


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
