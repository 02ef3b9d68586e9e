"""The life of a run as a function of a seed: attempts that save, die, sleep and wake up beside their successors.

The code under test is the real one (claims, shards, commit, take-over, restore, retention); only the clock, the storage
below `Store` and the order of events are virtual. `simulate` raises `Violation` if an invariant does not hold:

1. What loads was committed, and is what was saved.
2. A committed checkpoint is whole for as long as it is there, and a superseded attempt adds none behind its successor.
3. The newest stable checkpoint never goes back, and retention leaves as many newer ones as it promises.
4. Who reads a checkpoint that was not marked as expired can finish; what somebody pinned stays.
5. After all of it, an undisturbed attempt goes on, and leaves nothing but what the policy keeps.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from unittest import mock

import numpy as np

from orchestrator.checkpoint import keys, reader, retention, writer
from orchestrator.checkpoint import store as store_module
from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState, list_checkpoints
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.policy import RetentionConfig, judge
from orchestrator.checkpoint.retention import Pruner
from orchestrator.checkpoint.selection import select_checkpoint
from orchestrator.checkpoint.store import Store
from orchestrator.errors import (
    DamagedCheckpointError,
    StorageError,
    SupersededError,
    UnbrokenError,
    UnknownOutcomeError,
)
from orchestrator.restore_point import newest_sound, set_aside
from tests.orchestrator.checkpoint.serial_reads import serial_reads
from tests.orchestrator.checkpoint.shards import write_shard
from tests.orchestrator.checkpoint.states import make_info
from tests.orchestrator.checkpoint.virtual_store import NO_FAULTS, Faults, Process, VirtualTime, World, virtual_store
from trainers.errors import ConfigError
from trainers.exclusions import Exclusions
from trainers.shards import Chunk, TensorSpec

GRACE_S = 300.0
WORLD_SIZE = 2
SPEC = TensorSpec(name="model/w", dtype="U8", shape=(4, 2))
QUIET_AT_S = 6000.0
"""Few still sleep by then."""


class Violation(BaseException):
    """An invariant does not hold. No `except Exception` of the code under test may catch it."""


class Simulation:
    """One seed's world, its actors and what they may not do."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.rng = random.Random(~seed)
        self.saved: dict[CheckpointRef, bytes] = {}
        self.committed: dict[CheckpointRef, Manifest] = {}
        self.removed: set[CheckpointRef] = set()
        self.quarantined: set[CheckpointRef] = set()
        self.pinned: set[CheckpointRef] = set()
        self.rotten: CheckpointRef | None = None
        self.claims = 0
        self.bases: dict[int, CheckpointRef | None] = {}
        self.config = RetentionConfig(
            last=self.rng.choice([1, 2, 2, 3]), every_steps=self.rng.choice([None, None, 3]), grace_s=GRACE_S
        )
        self.world.on_effect = self.check_effect
        self.loads = 0

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
        store = virtual_store(self.world, process)
        for _ in range(10):
            try:
                step = self.launch(store, process)
                break
            except UnbrokenError as error:
                if process.faults is NO_FAULTS and not isinstance(error, DamagedCheckpointError):
                    raise
                self.world.pause(1.0)
        else:
            return
        pruner = Pruner(virtual_store(self.world, process), self.config, lambda: self.world.now)
        for _ in range(num_saves):
            self.world.pause(self.rng.choice([1.0, 10.0, GRACE_S]))
            step += 1
            try:
                self.save(store, process, step)
            except SupersededError:
                return
            except (StorageError, UnknownOutcomeError, DamagedCheckpointError):
                if process.faults is NO_FAULTS:
                    raise
                continue  # as the coordinator does: the next save is tried
            if not process.pruning:
                self.world.spawn(process, lambda: self.prune(pruner, process))

    def launch(self, store: Store, process: Process) -> int:
        process.attempt = claim_attempt(store, {})
        base = newest_sound(store, process.attempt, lambda *_: None, Exclusions())
        found = self.bases[process.attempt] = base and base.ref
        newest = max(self.committed.keys() - self.quarantined, default=None)
        if self.claims == process.attempt and newest != found and self.rotten not in (newest, found):
            raise Violation(f"attempt {process.attempt} goes on from {found}, not from {newest}")
        if base is None:
            return 0
        try:
            self.load(store, base)
        except DamagedCheckpointError as error:
            set_aside(store, base, str(error), process.attempt, lambda *_: None)
            raise
        return base.step

    def save(self, store: Store, process: Process, step: int) -> None:
        info = make_info(step, process.attempt)
        ref = CheckpointRef(info.progress.samples_seen, process.attempt)
        data = self.saved[ref] = self.rng.randbytes(8)
        receipts = []
        for rank in range(WORLD_SIZE):
            chunk = Chunk(spec=SPEC, row_offset=rank * 2, num_rows=2, begin=0, end=4)
            part = memoryview(data)[rank * 4 :][:4]
            receipts.append(write_shard(store, ref.shard(rank, WORLD_SIZE), [chunk], part, {}))
        writer.commit(store, receipts, info)

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

    # What must hold

    def check_effect(self, process: Process, verb: str, key: str, before: bytes | None) -> None:
        folder, _, name = key.removeprefix(f"{keys.CHECKPOINTS}/").partition("/")
        ref = CheckpointRef.parse(folder)
        if ref is None:
            self.claims = max(self.claims, keys.parse_attempt(name or key.rpartition("/")[2]) or 0)
            return
        data = self.world.objects.get(key)
        if verb == "delete" or name == keys.EXPIRED_NAME:
            self.check_fence(process, folder)
        if name == keys.EXPIRED_NAME and verb == "create" and ref in self.committed and self.rng.random() < 0.2:
            # Somebody looked at it just before.
            info = CheckpointInfo(ref=ref, state=CheckpointState.STABLE, manifest=self.committed[ref])
            act, person = self.rng.choice([self.read, self.pin]), Process("late")
            self.world.spawn(person, lambda: act(person, info))
        if name == keys.QUARANTINE_NAME and data is not None:
            self.quarantined.add(ref)
        elif name == keys.MANIFEST_NAME and data is not None and b"abandoned_by" not in data:
            self.check_commit(ref, Manifest.from_bytes(data, key))
        elif name == keys.MANIFEST_NAME and data is None and ref in self.committed:
            self.check_removal(ref)
        elif name.startswith("shard") and ref in self.committed and data != before and ref != self.rotten:
            raise Violation(f"{verb} {key}: it is committed")

    def check_fence(self, process: Process, folder: str) -> None:
        """A superseded attempt may carry out what it had decided on one checkpoint, and no more."""
        if 0 < process.attempt < self.claims:
            process.touched_when_superseded.add(folder)
            if len(process.touched_when_superseded) > 1:
                raise Violation(f"attempt {process.attempt} prunes beside attempt {self.claims}")

    def check_commit(self, ref: CheckpointRef, manifest: Manifest) -> None:
        if ref in self.removed:
            return  # a repeated request of a sleeper: no reader may take it for more than damage, see `choose`
        for file in manifest.files:
            data = self.world.objects.get(ref.file(file.name))
            if data is None or reader.xxhash.xxh3_128_hexdigest(data) != file.hash:
                raise Violation(f"{ref} is committed without its {file.name}")
        for attempt, base in self.bases.items():
            if attempt > ref.attempt and (base is None or ref > base):
                raise Violation(f"{ref} is committed behind attempt {attempt}, which began at {base}")
        self.committed[ref] = manifest

    def check_removal(self, ref: CheckpointRef) -> None:
        del self.committed[ref]
        self.removed.add(ref)
        newer = {other for other in self.committed.keys() - self.quarantined if other > ref}
        promised = (self.config.last or 0) - (self.rotten is not None)
        if len(newer) < promised or not newer - {self.rotten}:
            raise Violation(f"{ref} is removed; newer are only {sorted(map(str, newer))}")
        if ref in self.pinned:
            raise Violation(f"{ref} is pinned, and removed")


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
