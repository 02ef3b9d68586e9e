"""Restart after restart: one or both trainers killed at seeded moments, and each time the run goes on by itself."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from orchestrator.messages.attempts import Ending, Event
from tests.orchestrator.agent_processes import make_spec, run_agents
from tests.orchestrator.independent import assert_same_state
from tests.trainers.tiny import tiny_config

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("UNBROKEN_TEST_KILLS", "20"))
SEED = int(os.environ.get("UNBROKEN_TEST_SEED", "1"))
EVERY = 2
STEPS = EVERY * (2 * KILLS + 2)
BOUND_S = 60.0


class Killer:
    """After the first save of an attempt, kills within the steps up to the next but one; each attempt once."""

    def __init__(self) -> None:
        self._random = random.Random(SEED)
        self._pids: dict[int, int] = {}
        self._attempt = 0
        """The newest one that was hit, or is about to be."""
        self._at_step: int | None = None
        self._last_step_s = 0.0
        self._step_s = 0.0
        self._killed_at: float | None = None
        self.failed: list[str] = []
        self.kills = 0
        self.slowest_s = 0.0
        """From a kill to the next new save."""

    def __call__(self, event: Event) -> None:
        if event.kind == "trainer":
            self._pids[event.fields["rank"]] = event.fields["pid"]
        elif event.kind == "saved":
            self._saved(event.fields["step"], event.fields["attempt"])
        elif event.kind == "step":
            self._step_s, self._last_step_s = event.time_s - self._last_step_s, event.time_s
            # Or later: training goes on while a save is committed.
            if self._at_step is not None and event.fields["step"] >= self._at_step:
                self._at_step = None
                threading.Timer(self._random.random() * min(self._step_s, 1.0), self._kill).start()
        elif event.kind == "failure":
            self.failed.append(event.fields["kind"])

    def _saved(self, step: int, attempt: int) -> None:
        if attempt == self._attempt:  # of one that was hit: its save was in flight
            return
        if self._killed_at is not None:
            self.slowest_s = max(self.slowest_s, time.monotonic() - self._killed_at)
            self._killed_at = None
        if self.kills < KILLS:
            self._attempt, self._at_step = attempt, step + self._random.randint(1, EVERY)

    def _kill(self) -> None:
        self.kills += 1
        self._killed_at = time.monotonic()
        for rank in self._random.choice([[0], [1], [0, 1]]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGKILL)


def test_every_restart_succeeds(tmp_path: Path) -> None:
    config = tiny_config(train={"num_steps": STEPS})
    assert run_agents(make_spec(tmp_path / "straight", config, STEPS), 1, lambda _: None).ending is Ending.FINISHED
    killer = Killer()
    outcome = run_agents(make_spec(tmp_path / "run", config, EVERY), 2, killer, timeout_s=BOUND_S * (KILLS + 1))
    assert outcome.ending is Ending.FINISHED
    assert killer.failed == ["killed"] * KILLS
    assert killer.slowest_s < BOUND_S
    assert_same_state(tmp_path / "run", tmp_path / "straight")
