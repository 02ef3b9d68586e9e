from __future__ import annotations

import os
import time

import pytest

from bench.arm import Arm

# A child counts: it must be stopped and ended together with its parent.
PROGRAM = """
import os, json, time
child = os.fork()
if child == 0:
    for number in range(10**6):
        os.write(1, (json.dumps({"number": number, "pid": os.getpid(), "time_s": time.time()}) + "\\n").encode())
        time.sleep(0.01)
os.write(1, b"no JSON\n")
os.wait()
"""


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
    with pytest.raises(ProcessLookupError):
        os.kill(lines[-1]["pid"], 0)


def test_an_arm_that_ends_is_not_waited_for():
    with (
        Arm("ending", ["-c", "print('{\"number\": 1}')"], {}) as arm,
        pytest.raises(TimeoutError, match="ending said no more"),
    ):
        arm.wait_for(lambda line: line["number"] == 2)
