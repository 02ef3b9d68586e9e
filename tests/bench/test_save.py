"""The row `save` in small: its plans and turns on real trainers' states, without agents and background processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench import save
from bench.comparison import Comparison
from bench.workload import SMOKE
from orchestrator.run_spec import RunSpec
from tests.trainers.distributed import run_ranks
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.progress import Progress
from trainers.state import TrainState

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PEERS = ("torch DCP save", "torch DCP async_save, thread", "torch.save of every rank")
"""Without those that have to be installed, or start a process."""


class Checkpointer:
    """Keeps of a state only how far it is."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def restore(self, state: TrainState) -> None:
        if self._file.exists():
            step = int(self._file.read_text())
            state.progress = Progress(step, step)

    def save(self, state: TrainState) -> None:
        began = time.process_time()
        while time.process_time() - began < 0.03:  # the kernel counts in hundredths
            pass
        dist.barrier()
        self._file.write_text(str(state.progress.step))

    def wait(self) -> None:
        dist.barrier()


def take_turns(config: dict[str, Any], run_url: str, folder: str) -> int:
    """Collective: all ranks. Returns the step at which the run ends."""
    from bench.save_turns import FOLDER, take_turns

    os.environ[FOLDER] = folder  # ranks may come from a server that is older than this test
    os.sync = lambda: None  # in this process alone: it waits for what all others have written
    state, task = build(decode(TrainerConfig, config), torch.device("cpu"))
    take_turns(state, task, None, Checkpointer(Path(f"{run_url}.step")), None)
    return state.progress.step


def run_group(spec: RunSpec, world_size: int) -> None:
    folder = str(Path(spec.run_url).parent)
    steps = run_ranks(world_size, take_turns, spec.config, spec.run_url, folder, timeout_s=600)
    assert steps == [spec.num_steps] * world_size, "the run does not end with its last turn"


def test_every_turn_is_taken_and_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "run_group", run_group)
    monkeypatch.setenv("UNBROKEN_BENCH_FOLDER", os.environ.get("UNBROKEN_BENCH_FOLDER", ""))  # set anew, then unset
    for names in ("_SAVES", "_ASYNC", "_LOADS"):
        monkeypatch.setattr(save, names, tuple(name for name in getattr(save, names) if name.endswith(PEERS)))
    found = list(save._in_turns(SMOKE, launches=1, rounds=1))
    compared = [one for one in found if isinstance(one, Comparison)]
    pairs = {(one.name, one.reference_name): len(one.ours_s) for one in compared}
    for name in save._SAVES:
        assert pairs["save, read back and committed", name] == 1
        assert "async" in name or pairs["restore, checked", name] == 1
