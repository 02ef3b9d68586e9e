from __future__ import annotations

import pytest

from orchestrator.placing import count_workers

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
