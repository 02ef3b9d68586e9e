"""What tracking costs a step: the same run with every sink, and with none.

Both are `unbroken train` under Ray Train with two workers and a metric a step; one of them has W&B (offline, so that
the network is not what is measured), TensorBoard and Prometheus metrics. They are let run in turn, as in the row
`overhead`, the other one being stopped with every process that it has: the tracking process too, which is no descendant
of its driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.arm import Arm
from bench.comparison import Comparison
from bench.turns import medians, take_turns, warm_up
from bench.workload import MIDDLE, SMOKE, config

_GOAL = 1.005
_SINKS = {"wandb": {"project": "bench", "mode": "offline"}, "tensorboard": True, "prometheus": True}


def measure(quick: bool) -> list[Comparison]:
    """One comparison; a pair is one turn of each side, its times are medians."""
    channels, turns, steps = (SMOKE, 2, 3) if quick else (MIDDLE, 20, 8)
    with _arms(channels) as (tracked, plain):
        arms = (tracked, plain)
        warm_up(arms)
        times = medians(take_turns(arms, turns, steps))
    return [
        Comparison(
            name="W=2 M=2, microbatch 4: W&B offline, TensorBoard, Prometheus",
            reference_name="no tracking",
            ours_s=times["tracked"],
            reference_s=times["plain"],
            goal=_GOAL,
            notes={"steps in a turn": steps},
        )
    ]


class _TrackedArm(Arm):
    """An arm with the process that has left its tree."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
        self._folder = folder
        super().__init__(name, arguments, environment)

    def __exit__(self, *_: object) -> None:
        super().__exit__(*_)
        for pid in self._outside():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _signal(self, number: int) -> list[int]:
        for pid in self._outside():
            os.kill(pid, number)
        return super()._signal(number)

    def _outside(self) -> list[int]:
        """The tracking process of this run, and W&B's service."""
        pids = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
                if "orchestrator.tracking.process" in line and str(self._folder) in line:
                    children = [(task / "children").read_text().split() for task in (entry / "task").iterdir()]
                    pids += [int(entry.name), *(int(child) for group in children for child in group)]
            except OSError:
                continue  # it has just ended
        return pids


@contextlib.contextmanager
def _arms(channels: tuple[int, ...]) -> Iterator[tuple[Arm, Arm]]:
    # A short name: Ray's sockets lie below it, and their paths must stay under 108 characters.
    with tempfile.TemporaryDirectory(prefix="ub-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        tracking = folder / "runs" / "tracked" / "tracking"
        (folder / "ray").mkdir()
        environment = {"RAY_TMPDIR": str(folder / "ray"), "RAY_AUTH_MODE": "disabled"}
        with (
            _TrackedArm("tracked", _program(folder, channels, "tracked", _SINKS), environment, tracking) as tracked,
            Arm("plain", _program(folder, channels, "plain", {}), environment) as plain,
        ):
            yield tracked, plain


def _program(folder: Path, channels: tuple[int, ...], name: str, tracking: dict[str, Any]) -> list[str]:
    run = {
        **config(channels, microbatch_size=4, num_microbatches=2),
        "run": {"name": name},
        "storage": str(folder / "runs"),
        "workers": 2,
        "checkpoint": {"every_steps": 1_000_000},
        "tracking": tracking,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(run))
    return ["-m", "bench.under_ray", str(file)]
