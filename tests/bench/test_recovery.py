from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import recovery


class Replicas:
    """An arm of two replicas, and what they say; if not said otherwise, at the time at which it is heard."""

    name = "torchft"

    def __init__(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
        self.lines = iter([*before, *after])

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float) -> list[dict[str, Any]]:
        seen = []
        for line in self.lines:
            seen.append({"time_s": time.time(), **line})
            if wanted(seen[-1]):
                return seen
        raise AssertionError(f"nobody said it: {seen}")


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def step(rank: int, replicas: int, **fields: float) -> dict[str, Any]:
    return {"kind": "step", "rank": rank, "replicas": replicas, **fields}


def test_replicas_are_timed_alone_and_whole(victim: subprocess.Popen[bytes]):
    before = [{"kind": "imported", "rank": 1, "pid": victim.pid}]
    before += [step(0, replicas) for replicas in (1, 2, 1, *[2] * recovery._STEPS_BETWEEN)]
    late = step(0, 1, time_s=0.0)  # said before the kill, heard after it
    after = [step(0, 2), step(0, 1), step(1, 1), step(0, 2), step(1, 2)]
    side = recovery._Replicas(Replicas([*before, late], after))  # pyright: ignore[reportArgumentType]
    assert len(side.settle()) == recovery._STEPS_BETWEEN, "steps that one replica missed do not count"
    parts = side.kill(rank=1)
    assert victim.wait() == -signal.SIGKILL
    assert list(parts) == [recovery._ALONE, recovery._BACK] and all(0 <= seconds < 60 for seconds in parts.values())
    assert next(side.arm.lines, None) is None, "what is measured ends with the last line"


def test_kills_of_replicas_are_compared_with_as_many_of_ours():
    ours = [dict.fromkeys(recovery._PARTS["ray"], 0.1)] * 3
    others = {name: [{"imported": 5.0, "step": 1.0}] * 3 for name in ("torchrun", "plain ray")}
    replicas = {name: [{recovery._ALONE: 4.0, recovery._BACK: 4.0}] * 2 for name in recovery._LIGHTHOUSES}
    steps = {name: [0.3] for name in ("ray", *others, *replicas)}
    found = recovery.compare({"ray": ours, **others, **replicas}, steps)
    assert {one.reference_name: (len(one.ours_s), round(one.ratio, 3)) for one in found} == {
        "torchrun": (3, 0.133),
        "plain Ray Train, torch DCP": (3, 0.133),
        "torchft: the survivor": (2, 0.2),
        "torchft: the killed one is back": (2, 0.1),
        "torchft, tuned: the survivor": (2, 0.2),
        "torchft, tuned: the killed one is back": (2, 0.1),
    }
    assert len(recovery.compare({"ray": ours, **others}, steps)) == 2, "where torchft is not installed"
