"""Where everything of a run lies. No other file spells a key.

run.json                                                    created once
config.yaml
attempts/0007.json                                          one a (re)start: the fencing token
checkpoints/0000000012800-0007/                             <samples seen>-<attempt>: a key is never used twice
    shard-00000-of-00004.safetensors ...
    manifest.json                                           written last: its creation is the commit
    quarantine.json                                         if it turned out damaged: why
    pin.json                                                if somebody wants it kept: why
    expired.json                                            if it is about to be removed: begin no reading
events/0007-00000012-1f2e3d4c-0.jsonl                       <attempt>-<number>-<writer>-<level>: the run's own record
metrics/0007-00000013-1f2e3d4c-0.jsonl                      one row a step
samples/main/000000400.png                                  <weights>/<step>: images that were drawn while it trained
stacks/0007-00001.txt                                       <attempt>-<rank>: where a trainer stood when all hung
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

RUN_RECORD = "run.json"
CONFIG = "config.yaml"
ATTEMPTS = "attempts"
CHECKPOINTS = "checkpoints"
EVENTS = "events"
METRICS = "metrics"
SAMPLES = "samples"
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.json"
PIN_NAME = "pin.json"
EXPIRED_NAME = "expired.json"
EXPORT_RECORD = "unbroken.json"
"""Of an export, never of a run."""

_ATTEMPT = re.compile(r"(\d{4,})\.json")
_CHECKPOINT = re.compile(r"(\d{13,})-(\d{4,})")
_ROWS = re.compile(r"(\d{4,})-(\d{8,})-([0-9a-f]{8})-(\d)\.jsonl")


def probe_key(token: str) -> str:
    """A key for trying the store; hidden, should it be left behind, and in a folder that may go with it."""
    return f".probe-{token}/object"


def attempt_key(attempt: int) -> str:
    return f"{ATTEMPTS}/{attempt:04d}.json"


def stack_key(attempt: int, rank: int) -> str:
    return f"stacks/{attempt:04d}-{rank:05d}.txt"


def grid_key(weights: str, step: int) -> str:
    return f"{SAMPLES}/{weights}/{step:09d}.png"


def parse_attempt(name: str) -> int | None:
    """The number in `0007.json`; None for a file that is no attempt."""
    match = _ATTEMPT.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True, order=True)
class CheckpointRef:
    """Names one checkpoint. The greatest is the newest: the most samples, then the latest attempt."""

    samples_seen: int
    attempt: int

    @classmethod
    def parse(cls, name: str) -> CheckpointRef | None:
        """The reference written as `0000000012800-0007`; None for anything else."""
        match = _CHECKPOINT.fullmatch(name)
        return cls(int(match[1]), int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.samples_seen:013d}-{self.attempt:04d}"

    @cached_property
    def folder(self) -> str:
        return f"{CHECKPOINTS}/{self}"

    @property
    def manifest(self) -> str:
        return self.file(MANIFEST_NAME)

    @property
    def quarantine(self) -> str:
        return self.file(QUARANTINE_NAME)

    @property
    def pin(self) -> str:
        return self.file(PIN_NAME)

    @property
    def expired(self) -> str:
        return self.file(EXPIRED_NAME)

    def shard(self, rank: int, world_size: int) -> str:
        return self.file(shard_name(rank, world_size))

    def file(self, name: str) -> str:
        return f"{self.folder}/{name}"


@dataclass(frozen=True, order=True)
class RowsRef:
    """Names one object of `events` or `metrics`. The greater, the later; a writer uses no number twice."""

    attempt: int
    """The newest attempt that its rows are from; 0: none yet."""
    number: int
    writer: str
    """8 hex digits, unlike those of any other process."""
    level: int
    """How often its rows have been merged with others."""

    @classmethod
    def parse(cls, name: str) -> RowsRef | None:
        """The reference written as `0007-00000012-1f2e3d4c-0.jsonl`; None for anything else."""
        match = _ROWS.fullmatch(name)
        return cls(int(match[1]), int(match[2]), match[3], int(match[4])) if match else None

    def __str__(self) -> str:
        return f"{self.attempt:04d}-{self.number:08d}-{self.writer}-{self.level}.jsonl"


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
