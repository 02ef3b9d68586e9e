"""Preloaded by a test's fork server: makes trainers hang at placed steps, each plan once.

A plan is a file `<how>-<rank>-<step>` in the folder that the environment names: one folder for the whole session of
tests, because fork servers outlive a test and keep the environment that they were started in.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import trainers.loop
from trainers.state import TrainState
from trainers.step import Task, train_step

PLANS = "UNBROKEN_TEST_HANGS"


def step(state: TrainState, task: Task) -> dict[str, float]:
    where = f"{state.topology.rank}-{state.progress.step + 1}"
    for how in ("sleep", "gil"):
        plan = Path(os.environ[PLANS], f"{how}-{where}")
        if plan.exists():
            plan.unlink()
            if how == "sleep":
                time.sleep(1000)
            ctypes.PyDLL(None).sleep(1000)  # a C function that keeps the GIL
    return train_step(state, task)


trainers.loop.train_step = step
