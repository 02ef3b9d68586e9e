"""Thousands of seeds hold; and without any one of the guards, a seed shows what it is there for."""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from orchestrator.checkpoint import catalog, keys, policy, retention
from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import CheckpointState
from orchestrator.coordination.opening import Opener
from tests.orchestrator.checkpoint.serial_reads import serial_reads
from tests.orchestrator.checkpoint.simulation import Simulation, first_violation, simulate

NUM_SEEDS = int(os.environ.get("UNBROKEN_SIMULATION_SEEDS", "1500"))
"""Enough to see a guard go; run 10000 before a release."""
BATCH = 250
MUTANT_SEEDS = range(6000)


@pytest.mark.slow
def test_no_seed_violates_an_invariant():
    batches = [range(first, min(first + BATCH, NUM_SEEDS)) for first in range(0, NUM_SEEDS, BATCH)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        assert [found for found in pool.map(first_violation, batches) if found] == []


def test_the_seeds_meet_what_they_are_meant_to():
    met = dict.fromkeys(("claims", "loads", "quarantined", "pinned", "removed", "abandoned", "marked"), 0)
    met |= dict.fromkeys(counted := ("recalls", "skipped", "retried"), 0)
    with serial_reads():
        for seed in range(100):
            done = simulate(seed)
            trace = "\n".join(done.world.trace)
            met["claims"] += done.claims
            met["loads"] += done.loads
            for name in counted:
                met[name] += getattr(done, name)
            met["quarantined"] += len(done.quarantined)
            met["pinned"] += len(done.pinned)
            met["removed"] += trace.count("delete checkpoints") - trace.count("expired.json")
            met["marked"] += trace.count("expired.json")
            met["abandoned"] += sum(data.startswith(catalog._ABANDONED) for data in done.world.objects.values())
    assert all(count >= 3 for count in met.values()), met


def test_one_seed_is_one_trace():
    with serial_reads():
        for seed in range(20):
            assert simulate(seed).world.trace == simulate(seed).world.trace
        assert simulate(1).world.trace != simulate(2).world.trace


def commits_first(self, store, process, group):
    """Manifest first, shards after it: what the order of the two is there for."""
    later = []
    store.write = lambda key, parts: later.append((key, b"".join(map(bytes, parts))))
    try:
        SAVE(self, store, process, group)
    finally:
        del store.write
    for key, data in later:
        store.write(key, [data])


SAVE = Simulation.save


def removes_files_first(store, info, attempt):
    for name in sorted(info.names, reverse=True):
        store.delete(info.ref.file(name))
    return True


def sweeps_without_closing(store, ref, attempt):
    info = catalog.look(store, ref)
    return info and replace(info, state=CheckpointState.ABANDONED)


def judges_by_names(infos, config, attempt, undo_steps):
    """As most trainers do: a folder is a checkpoint."""
    infos = list(infos)
    refs = sorted((info.ref for info in infos), reverse=True)
    return [policy._judge(info, refs, config, attempt) for info in infos]


def keeps_not_the_newest(infos, config, attempt, undo_steps):
    return [
        replace(verdict, keep=verdict.keep and verdict.reason != "newest stable")
        for verdict in policy.judge(infos, config, attempt, undo_steps)
    ]


def forgets_pins(infos, config, attempt, undo_steps):
    infos = [replace(info, pinned=None) for info in infos]
    return policy.judge(infos, config, attempt, undo_steps)


def begins_what_is_expired(store):
    return [
        replace(info, names=tuple(name for name in info.names if name != keys.EXPIRED_NAME))
        for info in catalog.list_checkpoints(store)
    ]


def nothing(*_):
    return None


def looks_only(store, ref, attempt):
    return catalog.look(store, ref)


def asks_the_clock_late(self, verdict, attempt, began, report):
    return REMOVE(self, verdict, attempt, self._clock(), report)


REMOVE = retention.Pruner._remove


class Impatient(retention.Pruner):
    def __init__(self, store, config, clock):
        super().__init__(store, replace(config, grace_s=0.0), clock)


class Trusting(Opener):
    """Goes on from memory whoever else has claimed an attempt in between."""

    def _claim(self, info):
        return claim_attempt(self._store, info)


SIMULATION = "tests.orchestrator.checkpoint.simulation"
CATALOG, RETENTION, SELECTION, WRITER = (
    f"orchestrator.checkpoint.{name}" for name in ("catalog", "retention", "selection", "writer")
)
GUARDS = {
    "a commit checks the fence": ({f"{WRITER}.check_not_superseded": nothing}, "is committed behind attempt"),
    "a new attempt closes what older ones are about to commit": (
        {f"{CATALOG}.abandon": looks_only},
        "is committed behind attempt|goes on from",
    ),
    "a shard is read back": ({f"{WRITER}._read_back": nothing}, "is committed without its shard"),
    "the manifest comes last": (
        {f"{SIMULATION}.Simulation.save": commits_first, f"{WRITER}._read_back": nothing},
        "is committed without its shard",
    ),
    "the manifest goes first": ({f"{RETENTION}.remove": removes_files_first}, "it is committed"),
    "what is swept is closed before": (
        {f"{RETENTION}.abandon": sweeps_without_closing},
        "without its shard|it is comm",
    ),
    "only stable ones count": ({f"{RETENTION}.judge": judges_by_names}, "is removed; newer are only"),
    "the newest stable one stays": ({f"{RETENTION}.judge": keeps_not_the_newest}, "is removed; newer are only"),
    "pins are respected": ({f"{RETENTION}.judge": forgets_pins}, "is pinned, and removed"),
    "the grace period is over before the look": (
        {f"{RETENTION}.Pruner._remove": asks_the_clock_late},
        "is pinned, and",
    ),
    "readers have a grace period": ({f"{SIMULATION}.Pruner": Impatient}, "went away under|is pinned, and"),
    "nobody begins what is expired": (
        {f"{SELECTION}.list_checkpoints": begins_what_is_expired},
        "went away under|is pinned, and",
    ),
    "memory is of no use beside somebody else's attempt": (
        {"tests.orchestrator.checkpoint.agent_group.Opener": Trusting},
        "goes on from memory at step .* beside|is committed behind attempt",
    ),
    "only the newest attempt prunes": ({f"{RETENTION}.check_not_superseded": nothing}, "prunes beside attempt"),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_without_this_guard_a_seed_fails(guard, monkeypatch):
    patches, expected = GUARDS[guard]
    for target, mutant in patches.items():
        monkeypatch.setattr(target, mutant)
    found = first_violation(MUTANT_SEEDS)
    assert found is not None, f"without it all of {len(MUTANT_SEEDS)} seeds hold"
    assert re.search(expected, found[1]), found
