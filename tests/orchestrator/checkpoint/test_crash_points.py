"""The process dies before and after every operation, or one bit flips; what loads afterwards is what was saved."""

from __future__ import annotations

import os
import random

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints, newest_stable, quarantine
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.retention import Pruner, expire, pin
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.restore_point import newest_sound
from orchestrator.errors import DamagedCheckpointError
from tests.orchestrator.checkpoint.dict_store import DictStore
from tests.orchestrator.checkpoint.serial_reads import serial_reads
from tests.orchestrator.checkpoint.states import equal, load, make_state, save, write_shards
from trainers.exclusions import Exclusions

OLD, NEW = make_state(0), make_state(1)


class Died(BaseException):
    """No handler of errors runs after a SIGKILL."""


class Countdown:
    """Dies at one of the moments it is shown, and stays dead."""

    def __init__(self, moment: int) -> None:
        self.moment, self.seen = moment, 0

    def show(self) -> None:
        if self.seen == self.moment:
            raise Died
        self.seen += 1

    def around(self, function):
        def run(*args, **kwargs):
            self.show()
            result = function(*args, **kwargs)
            self.show()
            return result

        return run


class MortalStore:
    """A store whose process dies at `countdown`."""

    def __init__(self, inner: Store, countdown: Countdown) -> None:
        self.url, self.backend, self.conditional_create = inner.url, inner.backend, True
        names = (
            "read",
            "read_into",
            "write",
            "create",
            "exists",
            "size",
            "list",
            "delete",
            "unfinished_uploads",
            "age_s",
        )
        for name in names:
            setattr(self, name, countdown.around(getattr(inner, name)))


def check_and_go_on(store: Store, died: bool) -> bool:
    """Whether the new checkpoint counts. In any case the next attempt can make it."""
    found = newest_stable(store)
    new = found.manifest.progress.step == 2
    assert equal(load(store, found.manifest, 2), NEW if new else OLD)
    assert verify(store, found.ref) == []
    assert new or died
    save(store, NEW, step=2, attempt=claim_attempt(store, {}), world_size=2)
    assert equal(load(store, newest_stable(store).manifest, 2), NEW)
    return new


def prepare(url: str) -> Store:
    store = Store.open(url)
    assert claim_attempt(store, {}) == 1
    save(store, OLD, step=1, attempt=1, world_size=2)
    return store


def die_at(moment: int, url: str) -> tuple[bool, bool]:
    """Save at `url` in a process that dies at the moment; whether it did, and whether the new checkpoint counts."""
    store, died = prepare(url), False
    try:
        save(MortalStore(store, Countdown(moment)), NEW, step=2, attempt=1, world_size=2)
    except Died:
        died = True
    return died, check_and_go_on(store, died)


# Two shards: write, size, read. Commit: exists, list, create, read. The new one counts from the create on.
OUTCOMES = [False] * 17 + [True] * 4


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_every_storage_operation(tmp_path, kind):
    outcomes = []
    for moment in range(100):
        url = f"memory://{tmp_path.name}-{moment}" if kind == "memory" else str(tmp_path / str(moment))
        died, new = die_at(moment, url)
        outcomes.append(new)
        if not died:
            break
    assert outcomes == OUTCOMES


@pytest.mark.s3
@pytest.mark.parametrize("moment", [1, 5, 16, 17, 20])
def test_some_storage_operations_on_s3(s3_url, moment):
    assert die_at(moment, s3_url) == (moment < len(OUTCOMES) - 1, OUTCOMES[moment])


def test_every_system_call_of_a_local_save(tmp_path, monkeypatch):
    outcomes = []
    for moment in range(200):
        store = prepare(str(tmp_path / str(moment)))
        countdown, died = Countdown(moment), False
        with monkeypatch.context() as patch:
            for name in ("makedirs", "fsync", "replace", "link", "unlink"):
                patch.setattr(os, name, countdown.around(getattr(os, name)))
            try:
                save(store, NEW, step=2, attempt=1, world_size=2)
            except Died:
                died = True
        outcomes.append(check_and_go_on(store, died))
        if not died:
            break
    first = outcomes.index(True)
    assert outcomes == [False] * first + [True] * (len(outcomes) - first)
    assert first > 20 and len(outcomes) - first > 5  # moments before and after the commit were both met


STATES = {step: make_state(step) for step in range(1, 8)}
NEXT_STEP, PINNED_STEP, BROKEN_STEP = 7, 2, 4


def history(world_size: int) -> dict[str, bytes]:
    """Six checkpoints: of step 2 pinned, 3 half removed, 4 quarantined; and a save that was never committed."""
    store = DictStore()
    assert claim_attempt(store, {}) == 1
    for step in range(1, 7):
        save(store, STATES[step], step=step, world_size=world_size)
    pin(store, CheckpointRef(PINNED_STEP * 10, 1), "wanted")
    expire(store, CheckpointRef(30, 1), "superfluous")
    store.delete(CheckpointRef(30, 1).manifest)
    quarantine(store, CheckpointRef(BROKEN_STEP * 10, 1), "rotten", attempt=1)
    write_shards(store, STATES[NEXT_STEP], world_size, CheckpointRef(70, 1))
    return store.objects


def go_on(store: Store, world_size: int, last: int) -> None:
    """A whole life: take over, restore, save, commit, prune."""
    attempt = claim_attempt(store, {})
    base = newest_sound(store, attempt, lambda *_: None, Exclusions())
    assert equal(load(store, base.manifest, world_size), STATES[base.step])
    save(store, STATES[NEXT_STEP], step=NEXT_STEP, attempt=attempt, world_size=world_size)
    Pruner(store, RetentionConfig(last=last, grace_s=0.0)).prune(attempt, lambda _: None)


def stable_steps(store: Store) -> list[int]:
    return [info.step for info in list_checkpoints(store) if info.state is CheckpointState.STABLE]


def check_what_is_there(store: Store) -> None:
    """Everything that counts loads as what was saved; the newest before the life is there, and the pinned one."""
    steps = set()
    for info in list_checkpoints(store):
        if info.state is CheckpointState.STABLE:
            assert equal(load(store, info.manifest, 1), STATES[info.step])
            steps.add(info.step)
    assert PINNED_STEP in steps and BROKEN_STEP not in steps and steps & {6, NEXT_STEP}


def check_every_moment(world_size: int, last: int) -> int:
    """The number of moments at which the life ended."""
    before = history(world_size)
    kept = {1: [NEXT_STEP, PINNED_STEP], 2: [NEXT_STEP, 6, PINNED_STEP], 3: [NEXT_STEP, 6, 5, PINNED_STEP]}[last]
    with serial_reads():
        for moment in range(1000):
            store = DictStore(dict(before))
            died = False
            try:
                go_on(MortalStore(store, Countdown(moment)), world_size, last)
            except Died:
                died = True
            check_what_is_there(store)
            if not died:
                break
            go_on(store, 2, last)
            assert set(stable_steps(store)) <= {*kept, 6} and stable_steps(store)[0] == NEXT_STEP
            leftovers = [info for info in list_checkpoints(store) if info.state is CheckpointState.WRITING]
            assert leftovers == [], "the next life tidies up behind the one that died"
    assert stable_steps(store) == kept
    return moment


@pytest.mark.parametrize("last", [1, 2, 3])
def test_every_operation_of_a_whole_life(last):
    assert sum(check_every_moment(world_size, last) for world_size in range(1, 6)) > 2000 / 3


def test_no_flipped_bit_loads_silently():
    """10,000 random single bits, over all files of a checkpoint, loaded by as many ranks as wrote it and by others."""
    random_ = random.Random(0)
    store = DictStore()
    claim_attempt(store, {})
    ref = save(store, OLD, step=1, world_size=2).ref
    bits = [(key, bit) for key in store.objects if key.startswith(ref.folder) for bit in range(8 * store.size(key))]
    outcomes = {"not stable": 0, "refused": 0}
    with serial_reads():
        for key, bit in random_.choices(bits, k=10_000):
            whole = store.objects[key]
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            store.objects[key] = bytes(flipped)
            found = newest_stable(store)
            if found is None:
                outcomes["not stable"] += 1
            else:
                with pytest.raises(DamagedCheckpointError):
                    load(store, found.manifest, random_.choice([1, 2, 3]))
                outcomes["refused"] += 1
            store.objects[key] = whole
    assert min(outcomes.values()) > 1000 and sum(outcomes.values()) == 10_000
