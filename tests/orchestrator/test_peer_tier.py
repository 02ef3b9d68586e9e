"""Checkpoints in the memory of the nodes: what survives which loss, and what the next attempt begins from."""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.checkpoint import peer_objects
from orchestrator.checkpoint.attempts import check_not_superseded, claim_attempt
from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.peer_objects import Peer
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import commit
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.coordination.opening import Opener, Opening
from orchestrator.errors import AlreadyExistsError, StorageError, SupersededError
from orchestrator.messages.attempts import Ending
from orchestrator.sections import CheckpointConfig, Tier
from orchestrator.stores import Stores
from tests.orchestrator.agent_processes import make_spec, run_agents
from tests.orchestrator.checkpoint.shards import write_shard
from tests.orchestrator.checkpoint.states import equal, load, make_info, make_state, save, snapshot
from tests.orchestrator.group import make_spec as make_plain_spec
from tests.orchestrator.peers import Nodes
from tests.orchestrator.test_agents import STEPS, Script, assert_same, config, straight
from trainers.exclusions import Exclusions

__all__ = ["straight"]  # a fixture

TIERS = (Tier(url="peer://", every=1, keep=2), Tier(url="s3://b/p", every=3, keep=9))


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.lose(*found.servers)


@pytest.fixture
def storage() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def save_in_memory(nodes: Nodes, step: int, attempt: int = 1) -> None:
    """As two ranks do, on the nodes a and b."""
    info, receipts = make_info(step, attempt), []
    for rank, home in enumerate("ab"):
        store = nodes.ring(home).open()
        chunks, data = snapshot(make_state(step), rank, 2)
        key = f"checkpoints/{step * 10:013d}-{attempt:04d}/shard-{rank:05d}-of-00002.safetensors"
        receipts.append(write_shard(store, key, chunks, data, {}))
    commit(nodes.ring().open(), receipts, info)


class Group:
    """What a new group of agents does first."""

    def __init__(self, nodes: Nodes, storage: Store, **checkpoint: Any) -> None:
        self.events: list[str] = []
        self.stores = Stores(storage=storage, peer=nodes.ring("c").open() if nodes.servers else None)
        spec = make_plain_spec("", checkpoint=CheckpointConfig(tiers=TIERS, **checkpoint))
        self._opener = Opener(spec, self.stores, 2, lambda kind, /, **_: self.events.append(kind))

    def open(self, *steps: tuple[int, int]) -> Opening:
        """Args: steps: that the run leaves out."""
        return self._opener.open("start", Exclusions(steps=steps))

    def loads(self, opening: Opening, step: int) -> bool:
        assert opening.checkpoint is not None and opening.checkpoint.manifest is not None
        return equal(load(self.stores.of(opening.tier), opening.checkpoint.manifest, 3), make_state(step))


def test_the_loss_of_any_one_node_costs_nothing_and_reads_nothing_from_storage(
    storage: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lost in "abc":
        store, nodes = Store.open(f"memory://{uuid.uuid4().hex}"), Nodes()
        assert Group(nodes, store).open().attempt == 1
        save(store, make_state(3), step=3, world_size=2)
        save_in_memory(nodes, 3)
        save_in_memory(nodes, 5)
        nodes.lose(lost)
        with monkeypatch.context() as patch:
            patch.setattr(store.backend, "read", lambda *_: pytest.fail("storage is read"))
            group = Group(nodes, store)
            opening = group.open()
        assert (opening.attempt, opening.tier, opening.progress.step) == (2, "peer", 5)
        assert group.loads(opening, 5)
        nodes.lose(*nodes.servers)


def test_without_both_holders_of_a_shard_storage_is_taken(nodes: Nodes, storage: Store) -> None:
    Group(nodes, storage).open()
    save(storage, make_state(3), step=3, world_size=2)
    save_in_memory(nodes, 5)
    nodes.lose("a", "b")  # c has the shard of b, and none of a
    group = Group(nodes, storage)
    opening = group.open()
    assert (opening.tier, opening.progress.step) == ("storage", 3) and group.loads(opening, 3)
    assert "quarantined" not in group.events, "a node was lost, nothing is damaged"


def test_without_any_memory_storage_is_taken(nodes: Nodes, storage: Store) -> None:
    Group(nodes, storage).open()
    save(storage, make_state(3), step=3, world_size=2)
    group = Group(nodes, storage)
    nodes.lose("a", "b", "c")
    opening = group.open()
    assert (opening.tier, opening.progress.step) == ("storage", 3) and "peers_lost" in group.events


def test_what_is_newer_in_storage_is_taken_from_there(nodes: Nodes, storage: Store) -> None:
    Group(nodes, storage).open()
    save_in_memory(nodes, 5)
    save(storage, make_state(6), step=6, world_size=2)
    assert Group(nodes, storage).open().tier == "storage"


def test_how_far_training_may_get_ahead_counts_from_storage(nodes: Nodes, storage: Store) -> None:
    Group(nodes, storage).open()
    save(storage, make_state(3), step=3, world_size=2)
    save_in_memory(nodes, 5)
    opening = Group(nodes, storage, max_lag_steps=6).open()
    assert (opening.tier, opening.progress.step, opening.committed.step) == ("peer", 5, 3)
    save(storage, make_state(5), step=5, attempt=2, world_size=2)
    assert Group(nodes, storage, max_lag_steps=6).open().committed.step == 5


def test_what_a_rollback_undid_is_not_gone_on_from_in_memory_either(nodes: Nodes, storage: Store) -> None:
    Group(nodes, storage).open()
    for step in (3, 5):
        save_in_memory(nodes, step)
    group = Group(nodes, storage)
    opening = group.open((4, 6))
    assert (opening.tier, opening.progress.step) == ("peer", 3) and "quarantined" in group.events
    assert Group(nodes, storage).open().progress.step == 3, "known to a group that was not there"


def test_an_older_attempt_commits_nothing_in_memory_either(nodes: Nodes, storage: Store) -> None:
    Group(nodes, storage).open()
    save_in_memory(nodes, 5)
    Group(nodes, storage).open()
    with pytest.raises(SupersededError):
        save_in_memory(nodes, 6)
    store = nodes.ring().open()
    assert newest_stable(store).step == 5
    check_not_superseded(store, 2)


class TestStore:
    """What the commit stands on, with nodes that come and go."""

    def test_one_of_several_creators_wins_also_after_a_loss(self, nodes: Nodes) -> None:
        store = nodes.ring().open()
        assert [claim_attempt(store, {}) for _ in range(3)] == [1, 2, 3]
        nodes.lose("a")
        assert claim_attempt(nodes.ring("b").open(), {}) == 4
        assert claim_attempt(store, {}) == 5, "who has not heard of the loss finds out"

    def test_a_node_that_comes_late_and_empty_takes_no_key_twice(self, nodes: Nodes) -> None:
        late = nodes.servers.pop("a")
        assert claim_attempt(nodes.ring("b").open(), {}) == 1
        nodes.ring("b").open().create("x", b"mine")
        nodes.servers["a"] = late
        assert claim_attempt(nodes.ring("b").open(), {}) == 2
        with pytest.raises(AlreadyExistsError):
            nodes.ring("b").open().create("x", b"theirs")

    def test_a_node_that_failed_once_is_asked_again(self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, tried, cut_off = SimpleNamespace(now=1000.0), [], {nodes.servers["a"].port}
        connect = peer_objects._Wire

        def wire(peer: Peer, key: bytes) -> Any:
            tried.append(peer.node)
            if peer.port in cut_off:
                raise ConnectionResetError
            return connect(peer, key)

        monkeypatch.setattr(peer_objects, "_Wire", wire)
        monkeypatch.setattr(peer_objects, "time", SimpleNamespace(monotonic=lambda: clock.now))
        store = nodes.ring().open()
        for _ in range(2):
            store.write("x", [b"1"])
        assert tried == ["a", "b", "c"], "another one holds the second copy, and a is not asked again at once"
        clock.now += peer_objects._FIRST_PAUSE_S
        assert store.list("") == ["x"] and tried.count("a") == 2
        clock.now += peer_objects._FIRST_PAUSE_S
        assert store.list("") == ["x"] and tried.count("a") == 2, "less and less often"
        cut_off.clear()
        clock.now += peer_objects._FIRST_PAUSE_S
        store.write("y", [b"2"])
        assert tried.count("a") == 3 and "/y" in nodes.servers["a"]._objects

    def test_too_many_open_files_silence_no_node(self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
        accept, errors = socket.socket.accept, [OSError(24, "Too many open files")]

        def full(listener: socket.socket) -> Any:
            if errors:
                raise errors.pop()
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", full)
        for home in "ab":
            nodes.ring(home).open().write(home, [b"1"])
        assert errors == [] and nodes.ring("c").open().list("") == ["a", "b"]

    def test_nobody_without_the_key_is_served(self, nodes: Nodes) -> None:
        with pytest.raises(StorageError):
            replace(nodes.ring(), key=b"wrong").open().write("x", [b"1"])
        assert nodes.ring().open().list("") == []


@pytest.mark.chaos
@pytest.mark.slow
def test_trainers_begin_from_the_memory_of_nodes(straight: Path, tmp_path: Path, nodes: Nodes) -> None:
    """A group died at step 6: storage has step 3, and of what its nodes held one was lost."""
    run, copied = tmp_path / "run", "0000000000144-0001"
    shutil.copytree(straight, run)
    for folder in (run / "checkpoints").iterdir():
        if folder.name == copied:
            for path in folder.iterdir():
                nodes.ring("b").open().write(f"checkpoints/{copied}/{path.name}", [path.read_bytes()])
        if not folder.name.startswith("0000000000072"):
            shutil.rmtree(folder)
    nodes.lose("c")
    tiers = (Tier(url="peer://", every=2, keep=1), Tier(url=str(run), every=3, keep=9))
    # Before a trainer has heard that its save has ended it takes no other snapshot.
    script = Script(("saved", {"step": 8}, [0, 1]))
    spec: Any = make_spec(run, config(), 1000, tiers=tiers)
    assert run_agents(spec, 2, script, ring=nodes.ring()).ending is Ending.FINISHED
    assert len(script.of("failure")) == 1, script.of("failure")
    first, second = script.of("attempt")
    assert (first["tier"], first["restore"], first["memory"]) == ("peer", copied, None)
    assert (second["restore"], second["memory"]) == (None, 8)
    saved = [(saved["step"], saved["tier"]) for saved in script.of("saved")]
    assert {(8, "peer"), (10, "peer"), (9, "storage"), (STEPS, "storage")} <= set(saved)
    shutil.copytree(straight / "checkpoints" / copied, run / "checkpoints" / copied)
    assert_same(run, straight)


def test_what_lies_on_the_own_node_is_asked_of_no_other(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    save_in_memory(nodes, 5)
    info, asked = newest_stable(nodes.ring("b").open()), []
    assert info is not None and info.manifest is not None
    call = peer_objects._Node._call
    monkeypatch.setattr(
        peer_objects._Node, "_call", lambda node, exchange: asked.append(node._peer.node) or call(node, exchange)
    )
    store = nodes.ring("b").open()
    for file in ("manifest.json", info.manifest.files[1].name):
        assert store.read(info.ref.file(file)) and store.size(info.ref.file(file))
    assert set(asked) == {"b"}


@pytest.mark.chaos
@pytest.mark.slow
def test_a_run_of_another_size_goes_on_from_the_memory_of_nodes(straight: Path, tmp_path: Path, nodes: Nodes) -> None:
    """2 workers, a node less, 3 workers: the shards in memory are those of other ranks, and one holder is gone."""
    run = tmp_path / "run"
    tiers = (Tier(url="peer://", every=1, keep=2), Tier(url=str(run), every=3, keep=9))
    grow = ("step", HaltOrder(purpose=Purpose.GROW, reason="there is room"))
    spec: Any = make_spec(run, config(), 1000, tiers=tiers)
    outcome = run_agents(spec, 2, Script(), ring=nodes.ring(), order=grow)
    assert outcome is not None and outcome.ending is Ending.REGROUP
    nodes.lose("a")
    for folder in (run / "checkpoints").iterdir():  # only memory has what the next ones begin from
        (folder / "shard-00000-of-00002.safetensors").rename(tmp_path / folder.name)
    script = Script()
    spec = make_spec(run, config(parallel={"strategy": "ddp"}), 1000, tiers=tiers)
    assert run_agents(spec, 3, script, ring=nodes.ring("b")).ending is Ending.FINISHED
    (begun,) = script.of("attempt")
    assert begun["tier"] == "peer" and begun["restore"] == max(
        path.name for path in tmp_path.iterdir() if path.is_file()
    )
    for path in tmp_path.iterdir():
        if path.is_file():
            path.rename(run / "checkpoints" / path.name / "shard-00000-of-00002.safetensors")
    assert_same(run, straight)
