"""Whether a config can run here: what can be found out before, and without, starting anything."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from orchestrator.checkpoint import keys
from orchestrator.checkpoint.probe import probe
from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig, run_url
from orchestrator.errors import UnbrokenError
from orchestrator.preflight import check_trainable
from trainers.memory import optimizer_bytes
from trainers.models import empty_model

_DEADLINE_S = 15.0
_TEST_BYTES = 64 << 20
_RANGE_BYTES = 8 << 20
_NUM_READERS = 8
_MAX_SKEW_S = 60.0  # stores refuse requests from about 15 minutes on


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, kw_only=True)
class StateSize:
    """Bytes of a run's state; the same for all ranks together, whatever the strategy shards."""

    parameters: int
    total: int
    """Parameters, buffers, moments of the optimizer, and every EMA profile: what a checkpoint holds."""


def examine(config: RunConfig) -> Iterator[Check]:
    """Every check, as soon as it is done; the storage checks end with the first that fails.

    Raises:
        ConfigError: the config cannot run anywhere.
    """
    check_trainable(config)
    size = state_size(config)
    yield _ok("model", f"{size.parameters / 4e6:.2f} million parameters; a checkpoint holds {_show(size.total)}")
    yield _memory(config, size)
    try:
        yield from _storage(config, size)
    except UnbrokenError as error:
        yield Check(name="storage", verdict=Verdict.FAIL, detail=" ".join(str(error).split()))


def state_size(config: RunConfig) -> StateSize:
    """Counted on a model without memory."""
    with torch.device("meta"):
        model = empty_model(config.model, config.seed)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    buffers = sum(value.numel() * value.element_size() for value in model.buffers())
    copies = (1 + len(config.ema)) * trained
    return StateSize(parameters=trained, total=buffers + copies + optimizer_bytes(model, config.optimizer))


def _memory(config: RunConfig, size: StateSize) -> Check:
    """Every worker on this machine is the worst case; on a cluster each node needs its workers' share."""
    copies = config.max_workers if config.parallel.strategy == "ddp" else 1
    # A snapshot holds every row once. Training holds the state and the gradients, on a GPU if there is one.
    needed = size.total + (0 if config.resources.gpu else copies * (size.total + size.parameters))
    available = _available_memory()
    detail = f"{_show(needed)} for the state, gradients and snapshots of all workers; {_show(available)} available here"
    if needed <= available:
        return _ok("memory", detail)
    return Check(name="memory", verdict=Verdict.WARN, detail=f"{detail}: spread the workers over more machines")


def _storage(config: RunConfig, size: StateSize) -> Iterator[Check]:
    storage = run_url(config).rpartition("/")[0]  # not the run's own folder, which would then exist
    store = Store.reach(storage, _DEADLINE_S)
    free = store.free_bytes()
    if free is not None:
        yield _disk(free, size.total)
    store.list("")  # some stores make a bucket that does not exist when they are written to
    began = time.monotonic()
    facts = probe(store)
    yield _ok("storage", f"{storage} takes and returns objects; {1000 * (time.monotonic() - began):.0f} ms for a probe")
    verdict = Verdict.OK if facts.conditional_create else Verdict.WARN
    yield Check(name="create-if-absent", verdict=verdict, detail=facts.warning or "one of several creators wins")
    skew = store.clock_skew_s()
    if skew is not None:
        verdict = Verdict.OK if abs(skew) < _MAX_SKEW_S else Verdict.WARN
        yield Check(name="clock", verdict=verdict, detail=f"the store's is {skew:+.0f} s from this machine's")
    yield from _bandwidth(store, size.total)


def _disk(free: int, total: int) -> Check:
    detail = f"{_show(free)} free; a checkpoint takes {_show(total)}"
    if free < total:
        return Check(name="disk", verdict=Verdict.FAIL, detail=detail)
    verdict = Verdict.OK if free >= 3 * total else Verdict.WARN
    return Check(name="disk", verdict=verdict, detail=detail)


def _bandwidth(store: Store, total: int) -> Iterator[Check]:
    data = memoryview(bytes(min(_TEST_BYTES, max(total, 1 << 20))))
    key = keys.probe_key(uuid.uuid4().hex)
    try:
        began = time.monotonic()
        store.write(key, [data])
        rate = len(data) / (time.monotonic() - began)
        yield _ok("write", f"{rate / 1e6:.0f} MB/s from here; a save of {_show(total)} takes {total / rate:.1f} s")
        began = time.monotonic()
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            ranges = range(0, len(data), _RANGE_BYTES)
            parts = list(pool.map(lambda begin: store.read(key, begin, begin + _RANGE_BYTES), ranges))
        rate = len(data) / (time.monotonic() - began)
        if b"".join(parts) != data:
            yield Check(name="read", verdict=Verdict.FAIL, detail="the store returned other bytes than were written")
            return
        yield _ok("read", f"{rate / 1e6:.0f} MB/s to here; a restore of {_show(total)} takes {total / rate:.1f} s")
    finally:
        store.delete(key)


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, verdict=Verdict.OK, detail=detail)


def _show(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
