from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from bench import arm as arms
from bench.arm import Arm
from bench.workload import pin
from orchestrator.processes import birth

# A child counts: it must be stopped and ended together with its parent.
PROGRAM = """
import os, json, time
child = os.fork()
if child == 0:
    for number in range(10**6):
        os.write(1, (json.dumps({"number": number, "pid": os.getpid(), "time_s": time.time()}) + "\\n").encode())
        time.sleep(0.01)
os.write(1, b"no JSON\\n")
os.wait()
"""


def has_ended(pid: int) -> bool:
    """Gone, or waiting for whoever adopted it to take note."""
    return birth(pid) is None


def test_a_frozen_arm_stands_still_and_an_ended_one_is_gone():
    with Arm("counting", ["-c", PROGRAM], {}) as arm:
        arm.wait_for(lambda line: line["number"] == 5)
        arm.freeze()
        frozen = time.time()
        time.sleep(0.5)
        thawed = time.time()
        arm.thaw()
        lines = arm.wait_for(lambda line: line["time_s"] > thawed)
        assert all(not frozen + 0.1 < line["time_s"] < thawed for line in lines)
        assert arm.log.read_text() == "no JSON\n"
    deadline = time.monotonic() + 60  # on a busy machine a killed process waits for its turn to end
    while not has_ended(lines[-1]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(lines[-1]["pid"])


def test_an_arm_that_ends_is_not_waited_for():
    with (
        Arm("ending", ["-c", "print('{\"number\": 1}')"], {}) as arm,
        pytest.raises(TimeoutError, match="ending said no more"),
    ):
        arm.wait_for(lambda line: line["number"] == 2)


def test_a_helper_that_ends_by_itself_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    found = arms.descendants
    monkeypatch.setattr(arms, "descendants", lambda pid: [ended.pid, *found(pid)])  # seen a moment too late
    with Arm("counting", ["-c", PROGRAM], {}) as arm:
        arm.wait_for(lambda line: line["number"] == 1)
        arm.freeze()
        arm.thaw()
        last = arm.wait_for(lambda line: line["number"] > 1)[-1]
    deadline = time.monotonic() + 60
    while not has_ended(last["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert has_ended(last["pid"])


def test_the_log_is_this_users_own() -> None:
    with Arm("ending", ["-c", "print('{\"number\": 1}')"], {}) as arm:
        assert f"-{os.getuid()}-" in arm.log.name


def test_ranks_are_pinned_to_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {40, 12, 13})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append((pid, cores)))
    for rank in range(4):
        pin(rank, pid=7)
    pin(1)
    assert pinned == [(7, {12}), (7, {13}), (7, {40}), (7, {12}), (0, {13})]
