from __future__ import annotations

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from orchestrator.cluster import placing
from orchestrator.cluster.placing import count_workers

pytestmark = pytest.mark.ray  # imports it


@pytest.mark.parametrize(
    ("worker", "nodes", "expected"),
    [
        ({"CPU": 1.0}, {"a": {"CPU": 2.0}, "b": {"CPU": 1.0}}, 3),
        ({"CPU": 1.0}, {"a": {"CPU": 64.0}}, 4),
        ({"CPU": 2.0}, {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}}, 2),  # not 3: a worker is on one node
        ({"CPU": 1.0, "GPU": 1.0}, {"a": {"CPU": 9.0}, "b": {"CPU": 9.0, "GPU": 2.0}}, 2),
        ({"CPU": 0.1}, {"a": {"CPU": 0.3}}, 3),
        ({"CPU": 0.0}, {"a": {}}, 4),
        ({"CPU": 0.0}, {}, 0),
        ({"CPU": 1.0}, {"head": {"memory": 1e9}}, 0),
    ],
)
def test_count_workers(worker: dict[str, float], nodes: dict[str, dict[str, float]], expected: int) -> None:
    assert count_workers(worker, nodes, 4) == expected


def test_too_few_nodes_are_not_looked_for_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    pauses: list[float] = []
    monkeypatch.setattr(placing, "live_nodes", lambda ask: looks.append("look") or {})
    monkeypatch.setattr(placing.time, "sleep", pauses.append)
    policy = placing.LiveNodesPolicy(ScalingConfig(num_workers=(1, 2)))
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    assert (looks, pauses) == (["look"], [placing._LOOK_S])
