from __future__ import annotations

import pytest

from orchestrator.cluster.keepers import where

pytestmark = pytest.mark.ray  # imports it


def test_few_nodes_are_all_kept_warm_and_of_many_those_in_use() -> None:
    worker, nodes = {"CPU": 1.0}, {name: {"CPU": 1.0} for name in "abcd"} | {"head": {"CPU": 0.0}}
    assert where(nodes, (), worker, 2) == set("abcd")
    assert where(nodes, ["b", "gone"], worker, 1) == {"b"}
    assert where(nodes, (), worker, 1) == set()
