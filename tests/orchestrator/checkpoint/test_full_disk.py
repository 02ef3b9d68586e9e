"""A disk that is really full: a small file system in memory, filled by somebody else, and room again later."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Event
from orchestrator.tracking.record import read_events
from orchestrator.tracking.recorder import Recorder, RecorderConfig
from orchestrator.tracking.streaming import read_metrics
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.tracking.story import CONFIG

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no file system can be mounted: there is no mount")
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill(ballast: Path, left: int) -> None:
    """Args: left: bytes that stay free."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(file.tell() - left)


@pytest.mark.parametrize("left", [0, PAGE, 2 * PAGE, 3 * PAGE])
def test_what_does_not_fit_is_no_checkpoint_and_the_record_waits_for_room(disk: Path, left: int) -> None:
    store = Store.open(str(disk / "run"))
    open_or_create(store, CONFIG)
    save(store, make_state(0), step=5)
    told: list[Event] = []
    recorder = Recorder(store.url, "session", told.append, RecorderConfig(flush_s=0.01))
    try:
        fill(disk / "ballast", left)
        with pytest.raises(StorageError, match="no space left"):  # three shards and a manifest, of a page each
            save(store, make_state(1), step=10)
        newest = newest_stable(store)
        assert newest is not None and newest.step == 5 and verify(store, newest.ref) == []
        for number in range(1, 41):
            recorder.take(Event(kind="step", fields={"attempt": 1, "step": number, "metrics": {}}, time_s=number))
            recorder.take(Event(kind="saved", fields={"attempt": 1, "step": number}, time_s=number))
            time.sleep(0.005)
        end = time.monotonic() + 60
        while not told and time.monotonic() < end:
            time.sleep(0.01)
        os.unlink(disk / "ballast")
        save(store, make_state(1), step=10)  # the same once more: what the first try has left is in nobody's way
        newest = newest_stable(store)
        assert newest is not None and newest.step == 10 and verify(store, newest.ref) == []
    finally:
        recorder.close()
    assert told[0].kind == "record_failed" and "no space left" in told[0].fields["error"]
    assert [event.fields["step"] for event in read_events(store) if event.kind == "saved"] == [*range(1, 41)]
    assert [row["step"] for row in read_metrics(store)] == [*range(1, 41)]
