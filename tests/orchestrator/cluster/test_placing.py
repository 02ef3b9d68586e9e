from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.exceptions import WorkerGroupError

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


def test_groups_of_agents_that_begin_nothing_are_not_replaced_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: int | None, timeout: float) -> int:
        if answer is None:
            raise GetTimeoutError
        return answer

    monkeypatch.setattr(placing, "ray", SimpleNamespace(get=get))
    pauses: list[float] = []
    monkeypatch.setattr(placing.time, "sleep", pauses.append)
    answers = iter([0, 1, 3, None, 4, 5, 19, 20])
    mailbox: Any = SimpleNamespace(num_idle=SimpleNamespace(remote=lambda: next(answers)))
    policy = placing.Persevering(FailureConfig(max_failures=-1), mailbox, 20)
    lost = WorkerGroupError("", {0: ConnectionError("gone"), 1: OSError("no space left\non this device")})
    decisions = [policy.make_decision(lost) for _ in range(8)]
    assert decisions == [FailureDecision.RETRY] * 7 + [FailureDecision.RAISE] and pauses == [2, 4, 60]
    why = placing.why_given_up(lost, 20)
    assert why is not None and why.endswith("(failures.agents=20); last, rank 1: OSError: no space left")
    assert placing.why_given_up(RuntimeError("the controller died"), 3) is None


def test_what_an_earlier_controller_of_this_driver_held_is_freed_whatever_its_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = ("PENDING", "PREPARED", "CREATED", "RESCHEDULING", "REMOVED")
    table = {
        f"{number:02}{'0' * 26}{job}": {"state": state}
        for number, state in enumerate(states)
        for job in "01000000 02000000".split()
    }
    freed: list[str] = []
    context = SimpleNamespace(get_job_id=lambda: "01000000")
    monkeypatch.setattr(placing, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    monkeypatch.setattr(placing, "placement_group_table", lambda: table)
    monkeypatch.setattr(placing, "remove_placement_group", lambda group: freed.append(table[group.id.hex()]["state"]))
    placing._free_what_is_left()
    assert freed == list(states[:-1])
