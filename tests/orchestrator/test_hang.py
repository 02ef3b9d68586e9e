"""Real trainers that hang, hold the GIL or are stopped: named, their stacks stored, started anew, the same bits."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.coordination.watchdog import WatchdogConfig
from orchestrator.messages.attempts import Ending, Event
from orchestrator.run_spec import RunSpec
from tests.orchestrator.agent_processes import PRELOAD, make_spec, run_agents
from tests.orchestrator.hanging import PLANS
from tests.orchestrator.independent import assert_same_state
from tests.trainers.tiny import tiny_config

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

TIMEOUT_S = 6.0
_FOLDER = tempfile.TemporaryDirectory(prefix="unbroken-hangs-")
atexit.register(_FOLDER.cleanup)  # or a worker of pytest-xdist is warned that it is left to the interpreter
os.environ[PLANS] = _FOLDER.name
STEPS, EVERY = 12, 3


class Watch:
    """Stops a trainer once, and remembers how long training stood still after each fault."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.events: list[Event] = []
        self._pids: dict[int, int] = {}
        self._stop = stop

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "trainer":
            self._pids[event.fields["rank"]] = event.fields["pid"]
        if self._stop and event.kind == "step" and event.fields["step"] == self._stop[1]:
            os.kill(self._pids[self._stop[0]], signal.SIGSTOP)
            self._stop = None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.fields) for event in self.events if event.kind == kind]

    def pauses_s(self) -> list[float]:
        """From the last step before each hang to the first one after it."""
        steps = [event for event in self.events if event.kind == "step"]
        return [
            after.time_s - before.time_s
            for before, after in itertools.pairwise(steps)
            if before.fields["attempt"] != after.fields["attempt"]
        ]


def hanging_spec(run: Path, config: Mapping[str, Any]) -> RunSpec:
    return replace(
        make_spec(run, config, EVERY),
        preload=(*PRELOAD, "tests.orchestrator.hanging"),
        watchdog=WatchdogConfig(timeout_s=TIMEOUT_S),
    )


def test_hanging_gil_holding_and_stopped(tmp_path: Path) -> None:
    config = tiny_config(train={"num_steps": STEPS})
    assert run_agents(make_spec(tmp_path / "straight", config, EVERY), 1, Watch()).ending is Ending.FINISHED
    for plan in ("sleep-1-3", "gil-0-6"):
        Path(_FOLDER.name, plan).touch()
    watch = Watch(stop=(1, 10))
    outcome = run_agents(hanging_spec(tmp_path / "run", config), 2, watch)
    assert outcome.ending is Ending.FINISHED
    assert [hang["ranks"] for hang in watch.of("hang")] == [[1], [0], [1]]
    assert [(failure["kind"], failure["rank"]) for failure in watch.of("failure")] == [("hang", r) for r in (1, 0, 1)]
    sleeping, holding, stopped = ["".join(hang["where"]) for hang in watch.of("hang")]
    assert "hanging.py" in sleeping and "hanging.py" in holding and "SIGSTOP" in stopped
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert set(stacks) == {f"{attempt:04d}-{rank:05d}.txt" for attempt in (1, 2, 3) for rank in (0, 1)}
    assert "in step" in stacks["0001-00001.txt"] and "/torch/distributed/" in stacks["0001-00000.txt"]
    assert stacks["0003-00001.txt"].startswith("state T")
    print("seconds without a step:", [round(pause, 2) for pause in watch.pauses_s()])
    assert_same_state(tmp_path / "run", tmp_path / "straight")


def test_stopped_in_the_middle_of_a_message(tmp_path: Path) -> None:
    """Its agent waits for the rest, and hears no order meanwhile."""
    Path(_FOLDER.name, "torn-0-4").touch()
    watch = Watch()
    outcome = run_agents(hanging_spec(tmp_path / "run", tiny_config(train={"num_steps": 6})), 1, watch, timeout_s=60)
    assert outcome.ending is Ending.FINISHED
    assert [failure["kind"] for failure in watch.of("failure")] == ["hang"]
