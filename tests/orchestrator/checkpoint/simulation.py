"""The life of a run as a function of a seed: attempts that save, die, sleep and wake up beside their successors.

The code under test is the real one (claims, shards, commit, retries, take-over, restore from storage and from the
agents' memory, retention); only the clock, the storage below `Store` and the order of events are virtual. Saves that
come due while another one runs wait or are left out. `simulate` raises `Violation` if an invariant does not hold:

1. What loads was committed, and is what was saved.
2. A committed checkpoint is whole for as long as it is there, and a superseded attempt adds none behind its successor.
3. The newest stable checkpoint never goes back, and retention leaves as many newer ones as it promises.
4. Who reads a checkpoint that was not marked as expired can finish; what somebody pinned stays.
5. Who goes on from the agents' memory has nobody's later work behind it: the run has one past.
6. After all of it, an undisturbed attempt goes on, and leaves nothing but what the policy keeps.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from unittest import mock

import numpy as np

from orchestrator.checkpoint import keys, reader, retention, writer
from orchestrator.checkpoint import store as store_module
from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState, list_checkpoints
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.policy import RetentionConfig, judge
from orchestrator.checkpoint.retention import Pruner
from orchestrator.checkpoint.selection import select_checkpoint
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import CommitJob, carry_out
from orchestrator.errors import (
    DamagedCheckpointError,
    StorageError,
    SupersededError,
    UnbrokenError,
    UnknownOutcomeError,
)
from orchestrator.retries import patiently
from tests.orchestrator.checkpoint.agent_group import WORLD_SIZE, AgentGroup
from tests.orchestrator.checkpoint.invariants import Invariants, Violation
from tests.orchestrator.checkpoint.serial_reads import serial_reads
from tests.orchestrator.checkpoint.shards import prepare_shard
from tests.orchestrator.checkpoint.states import make_info
from tests.orchestrator.checkpoint.virtual_store import NO_FAULTS, Faults, Process, VirtualTime, World, virtual_store
from trainers.errors import ConfigError
from trainers.exclusions import Exclusions
from trainers.shards import Chunk, TensorSpec

GRACE_S = 300.0
SPEC = TensorSpec(name="model/w", dtype="U8", shape=(4, 2))
QUIET_AT_S = 6000.0
"""Few still sleep by then."""


class Simulation(Invariants):
    """One seed's world, its actors and what they may not do."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(~seed)
        last, every_steps = rng.choice([1, 2, 2, 3]), rng.choice([None, None, 3])
        super().__init__(World(seed), RetentionConfig(last=last, every_steps=every_steps, grace_s=GRACE_S))
        self.skips = rng.random() < 0.5
        self.trainer_deaths = rng.choice([0.0, 0.2])
        self.loads = self.recalls = self.skipped = self.retried = 0

    def run(self) -> None:
        rare = self.rng.choice([0.0, 0.003, 0.01, 0.03])
        faults = Faults(
            crash=rare * 0.5,
            **self.rng.choice([{"sleep": 0.01, "sleep_s": 5000.0}, {"sleep": 0.1, "sleep_s": 200.0}, {}]),
            fail=rare,
            lost=rare,
            late=self.rng.choice([rare, 0.1]),
            garble=self.rng.choice([0.0, 0.05]),
        )
        at = 0.0
        for number in range(self.rng.randrange(2, 5)):
            process = Process(f"p{number}", faults)
            self.world.spawn(process, lambda process=process: self.live(process, self.rng.randrange(2, 6)), at)
            at += self.rng.choice([5.0, 60.0, 600.0]) * self.rng.random() * 2
        for number in range(self.rng.randrange(6)):
            reading = self.rng.choice([self.read, self.pin])
            at_s = self.rng.uniform(0, at + 200)
            self.world.spawn(process := Process(f"r{number}"), lambda p=process, f=reading: f(p), at_s)
        if self.config.last != 1 and self.rng.random() < 0.3:
            self.world.after(self.rng.uniform(0, at), self.rot)
        self.world.spawn(process := Process("quiet"), lambda: self.finish(process), QUIET_AT_S)
        with mock.patch.object(store_module, "time", VirtualTime(self.world)):
            self.world.run()

    # What actors do

    def live(self, process: Process, num_saves: int) -> None:
        """A coordinator with its shards, from the claim to the end."""
        store, driver = virtual_store(self.world, process), f"{process.name} at {self.world.now}"
        for _ in range(10):
            try:
                group = self.launch(store, process, driver)
                break
            except SupersededError:
                return
            except UnbrokenError as error:
                if process.faults is NO_FAULTS and not isinstance(error, DamagedCheckpointError):
                    raise
                self.world.pause(1.0)
        else:
            return
        step = group.committed.step
        pruner = Pruner(virtual_store(self.world, process), self.config, lambda: self.world.now)
        for _ in range(num_saves):
            interval_s = self.rng.choice([1.0, 10.0, GRACE_S])
            self.world.pause(interval_s)
            step, began = step + 1, self.world.now
            group.held = make_info(step, process.attempt).progress, self.rng.randbytes(8)
            try:
                self.save(store, process, group)
            except SupersededError:
                return
            except (StorageError, UnknownOutcomeError, DamagedCheckpointError):
                if process.faults is NO_FAULTS:
                    raise
                # As the coordinator does: the next save is tried.
            if not process.pruning:
                self.world.spawn(process, lambda: self.prune(pruner, process))
            if self.skips:  # training went on meanwhile, and these saves were left out
                missed = int((self.world.now - began) // interval_s)
                step, self.skipped = step + missed, self.skipped + missed
            if self.rng.random() < self.trainer_deaths and not self.relaunch(store, process, group):
                return
            step = group.held[0].step if group.held else step

    def relaunch(self, store: Store, process: Process, group: AgentGroup) -> bool:
        """The trainers have died, their agents have not; False if the group can not go on."""
        held, previous = group.held, process.attempt
        assert held is not None
        for _ in range(5):
            try:
                opening = group.opener.open("killed", Exclusions(), group.remembered())
                break
            except UnbrokenError:
                self.world.pause(1.0)
        else:
            return False
        process.attempt = opening.attempt
        if opening.memory is None:  # the agents forget theirs: a group of its own goes on from storage
            return False
        self.recalls += 1
        self.bases[opening.attempt] = CheckpointRef(held[0].samples_seen, opening.attempt)
        self.check_one_past(process, previous, held[0])
        if opening.memory != opening.committed:
            with contextlib.suppress(StorageError, UnknownOutcomeError, DamagedCheckpointError, SupersededError):
                self.save(store, process, group)
        return True

    def launch(self, store: Store, process: Process, driver: str) -> AgentGroup:
        """A group of agents begins, with nothing in its memory."""
        group = AgentGroup(store, driver)
        opening = group.opener.open("start", Exclusions())
        process.attempt = opening.attempt
        base = opening.checkpoint
        found = self.bases[process.attempt] = base and base.ref
        newest = max(self.committed.keys() - self.quarantined, default=None)
        if self.claims == process.attempt and newest != found and self.rotten not in (newest, found):
            raise Violation(f"attempt {process.attempt} goes on from {found}, not from {newest}")
        if base is not None:
            try:
                self.load(store, base)
            except DamagedCheckpointError as error:
                group.opener.set_aside(opening, str(error))
                raise
        group.begin(opening)
        return group

    def save(self, store: Store, process: Process, group: AgentGroup) -> None:
        """What the group holds; whatever fails is tried again."""
        assert group.held is not None
        progress, data = group.held
        info = make_info(progress.step, process.attempt)
        ref = CheckpointRef(progress.samples_seen, process.attempt)
        self.saved[ref] = data
        tries = self.rng.choice([0, 0, 2])

        def pause() -> bool:
            nonlocal tries
            tries -= 1
            self.retried += tries >= 0
            self.world.pause(5.0)
            return tries >= 0

        receipts = []
        for rank in range(WORLD_SIZE):
            chunk = Chunk(spec=SPEC, row_offset=rank * 2, num_rows=2, begin=0, end=4)
            part = memoryview(data)[rank * 4 :][:4]
            shard = prepare_shard(keys.shard_name(rank, WORLD_SIZE), [chunk], part, {})
            patiently(lambda shard=shard: writer.store_shard(store, ref, shard), pause, lambda _: None)
            receipts.append(shard.receipt)
        ended = carry_out(store, CommitJob(shards=receipts, info=info, tier="storage"), pause)
        if ended.error is not None:
            raise SupersededError(ended.error) if ended.superseded else StorageError(ended.error)
        group.committed, group.checkpoint = progress, str(ref)

    def prune(self, pruner: Pruner, process: Process) -> None:
        """The thread beside the coordinator: one at a time, waiting for what it may remove later."""
        process.pruning = True
        with contextlib.suppress(StorageError, UnknownOutcomeError, SupersededError):
            while (wait_s := pruner.prune(process.attempt, lambda _: None)) is not None:
                self.world.pause(min(wait_s, self.rng.choice([wait_s, 5.0])))  # or the next commit asks for a pass
        process.pruning = False

    def load(self, store: Store, info: CheckpointInfo) -> None:
        assert info.manifest is not None
        out = np.zeros(8, np.uint8)
        reader.read_rows(store, info.manifest, [reader.Destination(spec=SPEC, row_offset=0, num_rows=4, out=out.data)])
        if out.tobytes() != self.saved[info.ref]:
            raise Violation(f"{info.ref} loads as something else")
        self.loads += 1

    def read(self, process: Process, found: CheckpointInfo | None = None) -> None:
        """A person's command: any checkpoint that may still be begun."""
        store = virtual_store(self.world, process)
        found = found or self.choose(store)
        if found is None:
            return
        try:
            self.world.pause(self.rng.uniform(0, GRACE_S * 0.8))
            self.load(store, found)
        except UnbrokenError as error:
            if found.ref not in (self.rotten, *self.quarantined):
                raise Violation(f"{found.ref} went away under its reader: {error}") from error

    def pin(self, process: Process, found: CheckpointInfo | None = None) -> None:
        store = virtual_store(self.world, process)
        found = found or self.choose(store)
        if found is not None:
            self.world.pause(self.rng.uniform(0, GRACE_S * 0.8))
            if retention.pin(store, found.ref, "wanted"):
                self.pinned.add(found.ref)

    def choose(self, store: Store) -> CheckpointInfo | None:
        steps = [ref.samples_seen // 10 for ref in sorted(self.committed)[-3:]]
        with contextlib.suppress(ConfigError):
            return select_checkpoint(store, self.rng.choice(steps)) if steps else None

    def expired(self, ref: CheckpointRef) -> None:
        if self.rng.random() < 0.2:  # somebody looked at it just before
            info = CheckpointInfo(ref=ref, state=CheckpointState.STABLE, manifest=self.committed[ref])
            act, person = self.rng.choice([self.read, self.pin]), Process("late")
            self.world.spawn(person, lambda: act(person, info))

    def rot(self) -> None:
        """A bit of a committed checkpoint flips."""
        if self.committed:
            self.rotten = self.rng.choice(sorted(self.committed))
            key = self.rotten.file(self.rng.choice([keys.MANIFEST_NAME, keys.shard_name(1, WORLD_SIZE)]))
            data = bytearray(self.world.objects[key])
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            self.world.objects[key] = bytes(data)

    def finish(self, process: Process) -> None:
        """Nothing goes wrong any more: the run goes on, and tidies up."""
        for num_saves in (2, 1):
            self.live(process, num_saves)
            while not self.world.idle:  # the last sleepers
                self.world.pause(1000.0)
        store = virtual_store(self.world, process)
        pruner = Pruner(store, self.config, lambda: self.world.now)
        while (wait_s := pruner.prune(process.attempt, lambda _: None)) is not None:
            self.world.pause(wait_s)
        left = judge(list_checkpoints(store), self.config, process.attempt)
        if surplus := [str(verdict.info.ref) for verdict in left if not verdict.keep or verdict.info.expired]:
            raise Violation(f"{surplus} are still there")


def simulate(seed: int) -> Simulation:
    """Run one seed. Within `serial_reads`."""
    simulation = Simulation(seed)
    simulation.run()
    return simulation


def first_violation(seeds: Iterable[int]) -> tuple[int, str] | None:
    """The first seed that violates an invariant, and how."""
    with serial_reads():
        for seed in seeds:
            try:
                simulate(seed)
            except Violation as violation:
                return seed, str(violation)
    return None
