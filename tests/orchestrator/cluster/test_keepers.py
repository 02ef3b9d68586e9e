from __future__ import annotations

from types import SimpleNamespace

import pytest

from orchestrator.cluster import keepers
from orchestrator.cluster.keepers import Keepers, where

pytestmark = pytest.mark.ray  # imports it


def test_few_nodes_are_all_kept_warm_and_of_many_those_in_use() -> None:
    worker, nodes = {"CPU": 1.0}, {name: {"CPU": 1.0} for name in "abcd"} | {"head": {"CPU": 0.0}}
    assert where(nodes, (), worker, 2) == set("abcd")
    assert where(nodes, ["b", "gone"], worker, 1) == {"b"}
    assert where(nodes, (), worker, 1) == set()


def test_a_node_that_is_drained_keeps_its_own_until_the_agents_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: object()))
    monkeypatch.setattr(keepers, "_Keeper", made)
    first, second = (letter * 56 for letter in "ab")
    two = Keepers("session", (), {"CPU": 1.0}, 2)
    two.tend({first: {"CPU": 1.0}, second: {"CPU": 1.0}}, [first, second])
    kept = dict(two._keepers)
    assert kept.keys() == {first, second}
    two.tend({second: {"CPU": 1.0}}, [first, second])
    assert two._keepers == kept
    two.tend({second: {"CPU": 1.0}}, [second])
    assert two._keepers.keys() == {second}
