"""What must hold in a simulation, whatever happens: checked after each change of its storage."""

from __future__ import annotations

import json

from orchestrator.checkpoint import keys, reader
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.policy import RetentionConfig
from tests.orchestrator.checkpoint.virtual_store import Process, World
from trainers.progress import Progress


class Violation(BaseException):
    """An invariant does not hold. No `except Exception` of the code under test may catch it."""


class Invariants:
    """What became of every checkpoint and attempt; the list of what must hold is in `simulation`."""

    def __init__(self, world: World, config: RetentionConfig) -> None:
        self.world = world
        self.config = config
        self.saved: dict[CheckpointRef, bytes] = {}
        self.committed: dict[CheckpointRef, Manifest] = {}
        self.removed: set[CheckpointRef] = set()
        self.quarantined: set[CheckpointRef] = set()
        self.pinned: set[CheckpointRef] = set()
        self.rotten: CheckpointRef | None = None
        self.claims = 0
        self.claimed_by: dict[int, str] = {}
        """Name of the process."""
        self.bases: dict[int, CheckpointRef | None] = {}
        world.on_effect = self.check_effect

    def expired(self, ref: CheckpointRef) -> None:
        """A committed checkpoint has just been marked."""

    def check_effect(self, process: Process, verb: str, key: str, before: bytes | None) -> None:
        folder, _, name = key.removeprefix(f"{keys.CHECKPOINTS}/").partition("/")
        ref = CheckpointRef.parse(folder)
        data = self.world.objects.get(key)
        if ref is None:
            attempt = keys.parse_attempt(key.rpartition("/")[2])
            if attempt is not None and data is not None:
                self.claims = max(self.claims, attempt)
                self.claimed_by[attempt] = json.loads(data)["session"].split()[0]
            return
        if verb == "delete" or name == keys.EXPIRED_NAME:
            self.check_fence(process, folder)
        if name == keys.EXPIRED_NAME and verb == "create" and ref in self.committed:
            self.expired(ref)
        if name == keys.QUARANTINE_NAME and data is not None:
            self.quarantined.add(ref)
        elif name == keys.MANIFEST_NAME and data is not None and b"abandoned_by" not in data:
            self.check_commit(ref, Manifest.from_bytes(data, key))
        elif name == keys.MANIFEST_NAME and data is None and ref in self.committed:
            self.check_removal(ref)
        elif name.startswith("shard") and ref in self.committed and data != before and ref != self.rotten:
            raise Violation(f"{verb} {key}: it is committed")

    def check_one_past(self, process: Process, previous: int, held: Progress) -> None:
        between = {self.claimed_by[attempt] for attempt in range(previous + 1, process.attempt)}
        later = [ref for ref in self.committed.keys() - self.quarantined if ref.samples_seen > held.samples_seen]
        if between - {process.name} or later:
            others = sorted([*between, *map(str, later)])
            raise Violation(f"attempt {process.attempt} goes on from memory at step {held.step} beside {others}")

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
