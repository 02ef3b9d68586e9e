"""Preloaded by a test's fork server: makes trainers hang at placed steps, each plan once.

A plan is a file `<how>-<rank>-<step>` in the folder that the environment names: one folder for the whole session of
tests, because fork servers outlive a test and keep the environment that they were started in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import trainers.loop
from orchestrator.agents import trainer_process
from trainers.progress import Progress
from trainers.state import TrainState
from trainers.step import Task, train_step

PLANS = "UNBROKEN_TEST_HANGS"


def planned(how: str, rank: int, step: int) -> bool:
    plan = Path(os.environ[PLANS], f"{how}-{rank}-{step}")
    if found := plan.exists():
        plan.unlink()
    return found


def step(state: TrainState, task: Task) -> dict[str, float]:
    where = state.topology.rank, state.progress.step + 1
    if planned("sleep", *where):
        time.sleep(1000)
    if planned("gil", *where):
        ctypes.PyDLL(None).sleep(1000)  # a C function that keeps the GIL
    return train_step(state, task)


class TornSink(trainer_process.PipeSink):
    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        if planned("torn", self._rank, progress.step):
            os.write(self._agent.fileno(), struct.pack("!i", 1000) + b"the beginning of a message of 1000 bytes")
            os.kill(os.getpid(), signal.SIGSTOP)
        super().log(progress, metrics)


trainers.loop.train_step = step
trainer_process.PipeSink = TornSink
