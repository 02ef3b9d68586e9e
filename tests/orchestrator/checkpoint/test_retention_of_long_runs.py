"""What a pass costs when many checkpoints are kept for good, and that it removes nothing for having looked at fewer."""

from __future__ import annotations

import random

import pytest

from orchestrator.checkpoint import keys, retention
from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import list_checkpoints, quarantine
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import FileEntry, Manifest
from orchestrator.checkpoint.policy import BestConfig, RetentionConfig, judge
from orchestrator.checkpoint.retention import Pruner, pin, unpin
from orchestrator.errors import StorageError, UnbrokenError
from tests.orchestrator.checkpoint.dict_store import DictObjects, DictStore
from trainers.progress import Progress


class Counting(DictObjects):
    """Counts what is asked for, and can be away."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.num_requests = 0
        self.left: int | None = None
        """Requests until it is away."""

    def __getattribute__(self, name: str):
        if name in ("read", "write", "create_once", "size", "list", "delete"):
            self.num_requests += 1
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise StorageError("away")
        return super().__getattribute__(name)


class LongRun:
    """A run whose checkpoints have one file each."""

    def __init__(self, **config) -> None:
        self.store = DictStore()
        self.store.backend = self.backend = Counting(self.store.objects)
        self.config = RetentionConfig(**({"grace_s": 0.0} | config))
        self.attempt = claim_attempt(self.store, {})
        self.removed: list[CheckpointRef] = []
        self.pruner = self.new_pruner()

    def new_pruner(self, undo_steps: int = 0) -> Pruner:
        return Pruner(self.store, self.config, lambda: 0.0, undo_steps=undo_steps)

    def save(self, step: int, loss: float = 1.0) -> CheckpointRef:
        ref, name = CheckpointRef(step * 10, self.attempt), keys.shard_name(0, 1)
        file = FileEntry(name=name, size_bytes=1, hash="0", header_hash="0", header_bytes=1)
        fields = {"run_id": "r", "reason": "interval", "world_size": 1, "strategy": "ddp", "config_hash": "h"}
        fields |= {"versions": {}, "scalars": {}, "health": {"ok": True}, "metrics": {"loss": loss}, "created_at": ""}
        progress = Progress(step, step * 10)
        manifest = Manifest(attempt=self.attempt, progress=progress, files=(file,), tensors={}, **fields)
        self.store.objects[ref.file(name)] = b"x"
        self.store.objects[ref.manifest] = manifest.to_bytes()
        return ref

    def prune(self) -> int:
        """How many requests it takes."""
        before = self.backend.num_requests
        self.pruner.prune(self.attempt, lambda removal: self.removed.append(removal.ref))
        return self.backend.num_requests - before

    @property
    def steps(self) -> list[int]:
        return [info.step for info in reversed(list_checkpoints(self.store)) if info.state == "stable"]


def costs(run: LongRun, num_kept: int) -> int:
    """Requests of a pass in the run, after a save."""
    for step in range(1, num_kept + 1):
        run.save(step * 10)
    run.prune()
    for step in range(1, 4):
        run.save(num_kept * 10 + step)
        cost = run.prune()
    return cost


@pytest.mark.parametrize(
    "config",
    [
        {"last": 2, "every_steps": 10},
        {"last": 2, "every_steps": 10, "best": BestConfig(num=3)},
        {"last": None},
    ],
    ids=["every", "best", "all"],
)
def test_a_pass_asks_no_more_of_a_run_that_keeps_more(config):
    assert costs(LongRun(**config), 100) == costs(LongRun(**config), 400) < 60


def test_pinned_ones_cost_no_more_either():
    found = []
    for num in (100, 400):
        run = LongRun(last=2)
        for step in range(1, num + 1):
            pin(run.store, run.save(step), "dear")
        run.prune()
        run.save(num + 1)
        found.append(run.prune())
    assert found[0] == found[1] < 60


def test_in_its_turn_each_one_is_looked_at():
    run = LongRun(last=1, every_steps=10)
    refs = [run.save(step * 10) for step in range(1, 101)]
    pinned = run.save(1005)
    pin(run.store, pinned, "dear")
    run.save(1010)
    run.prune()
    assert run.steps == [*range(10, 1001, 10), 1005, 1010]
    unpin(run.store, pinned)
    quarantine(run.store, refs[50], "rotten", run.attempt)
    for _ in range(-(-102 // retention._LOOKS)):
        run.prune()
    assert run.removed == [refs[50], pinned] or run.removed == [pinned, refs[50]]
    assert run.steps == [step for step in range(10, 1011, 10) if step != 510]


def test_one_that_a_newest_one_stood_before_stays_when_that_turns_out_rotten():
    """What counts as one of the newest two is looked at in every pass, kept for good or not."""
    run = LongRun(last=2, every_steps=10)
    refs = [run.save(step) for step in (*range(10, 401, 10), 405, 410, 420)]
    run.prune()
    assert run.steps[-3:] == [400, 410, 420]
    run.save(425)
    quarantine(run.store, refs[-1], "rotten", run.attempt)
    quarantine(run.store, refs[-2], "rotten", run.attempt)
    run.save(426)
    run.prune()
    assert run.steps[-3:] == [400, 425, 426]
    other = run.save(427)
    for ref in (other, *(CheckpointRef(step * 10, run.attempt) for step in (425, 426))):
        quarantine(run.store, ref, "rotten", run.attempt)
    run.prune()
    assert run.steps == list(range(10, 401, 10)), "nothing newer is sound: all is as it was"


@pytest.mark.parametrize("other_process", [False, True])
def test_a_pass_that_breaks_off_anywhere_is_completed_by_the_next(other_process: bool):
    broken = 0
    for left in range(100):
        run = LongRun(last=1, every_steps=10)
        for step in range(10, 301, 10):
            run.save(step)
        run.prune()
        run.save(305)
        run.save(311)
        run.backend.left = left
        try:
            run.prune()
        except UnbrokenError:
            broken += 1
        run.backend.left = None
        if other_process:
            run.pruner = run.new_pruner()
        run.prune()
        assert run.steps == [*range(10, 301, 10), 311]
        assert not [key for key in run.store.objects if "0000000003050" in key]
    assert 20 < broken < 60, "a pass has so many requests"


@pytest.mark.parametrize("seed", range(24))
def test_nothing_goes_that_a_look_at_all_of_them_would_keep(seed, monkeypatch):
    chance = random.Random(seed)
    monkeypatch.setattr(retention, "_LOOKS", chance.choice([0, 1, 3]))
    best = chance.choice([None, BestConfig(num=2)])
    undo_steps = chance.choice([0, 0, 7, 30])
    run = LongRun(last=chance.choice([1, 2, 5]), every_steps=chance.choice([None, 3, 10]), best=best)
    run.pruner = run.new_pruner(undo_steps)
    refs, step = [], 0
    for _ in range(60):
        step += chance.choice([1, 1, 2, 5])
        refs.append(run.save(step, chance.random()))
        for _ in range(chance.randrange(3)):
            ref = chance.choice(refs[-8:] if chance.random() < 0.5 else refs)
            if ref.manifest in run.store.objects:
                act = chance.choice([lambda r: quarantine(run.store, r, "rotten", 1), lambda r: pin(run.store, r, "x")])
                chance.choice([act, lambda r: unpin(run.store, r)])(ref)
        fresh = judge(list_checkpoints(run.store), run.config, run.attempt, undo_steps)
        run.removed.clear()
        run.prune()
        kept = {verdict.info.ref for verdict in fresh if verdict.keep}
        assert not kept.intersection(run.removed)
    monkeypatch.setattr(retention, "_LOOKS", 1000)
    run.prune()
    verdicts = judge(list_checkpoints(run.store), run.config, run.attempt, undo_steps)
    assert all(verdict.keep for verdict in verdicts), "and in the end the same is left"
