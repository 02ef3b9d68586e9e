"""From the loss of an agent, or of a node, to the next completed step: Ray Train with two nodes on this machine.

An agent that is killed takes its trainer and its snapshots with it; of a node everything is killed at once, and
training goes on with the other one until there is a new node. Both happen at a random moment of a step. The agent's
time is held against the bare cost of a start, measured in the same run: see `bench/bare_start.py`.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.arm import Arm
from bench.bare_start import WORLD_SIZE
from bench.comparison import Comparison
from bench.figure import Figure
from bench.programs import free_port, workplace, write_config
from orchestrator.chaos.nodes import LocalNodes, Place, kill_node_of
from orchestrator.config import load_config, to_dict
from orchestrator.driver import preload

_AGENT_GOAL = 1.3
_NODE_GOAL_S = 15.0
_EVERY_STEPS = 10
_STEPS_BETWEEN = 12
_ROOT = Path(__file__).parent.parent
_OVERRIDES = (
    "train.num_steps=1000000",
    f"checkpoint.every_steps={_EVERY_STEPS}",
    "workers={min: 1, max: 2}",
    "run.name=nodes",
    "validation.num_samples=null",
    "validation.every_steps=null",
    "samples.every_steps=null",
)
_PARTS = {
    "noticed by Ray Train": "group_lost",
    "old group ended": "placing",
    "new workers up": "placed",
    "agents meet, claim": "attempt",
    "fork": "trainer",
    "process group": "process group",
    "build": "built",
    "restore": "training",
    "first step": "step",
}
"""The parts of a replacement, in order, and what ends each on the last rank."""


def measure(quick: bool) -> list[Comparison | Figure]:
    """Agents first, then nodes, then the bare starts."""
    num_agents, num_nodes = (1, 1) if quick else (6, 4)
    config = load_config("configs/digits.yaml", _OVERRIDES)
    with workplace() as folder:
        file = write_config(folder, to_dict(config))
        nodes = LocalNodes(num_nodes=2, cpus=1, variables={"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"})
        try:
            with Arm("nodes", ["-m", "bench.under_ray", str(file)], nodes.environment) as arm:
                run = _Run(arm, nodes)
                run.grow()
                agents = [run.lose(rank % 2, _kill) for rank in range(num_agents)]
                lost = []
                for rank in range(num_nodes):
                    lost.append(run.lose(rank % 2, kill_node_of))
                    run.grow()
        finally:
            nodes.close()
        checkpoint = sorted((folder / "runs" / "nodes" / "checkpoints").glob("*/manifest.json"))[-1].parent
        bare = [_start_bare(checkpoint, preload(config)) for _ in agents]
    totals = [sum(parts.values()) for parts in lost]
    return [
        Comparison(
            name="agent SIGKILL to next step",
            reference_name="python, imports, process group, read",
            ours_s=[sum(parts.values()) for parts in agents],
            reference_s=bare,
            goal=_AGENT_GOAL,
            notes={"medians of the parts (s)": _medians(agents)},
        ),
        Figure(
            name="node lost to next step",
            value=statistics.median(totals),
            unit="s",
            goal=_NODE_GOAL_S,
            notes={"medians of the parts (s)": _medians(lost), "longest (s)": max(totals)},
        ),
    ]


class _Run:
    """A run on nodes that can be lost."""

    def __init__(self, arm: Arm, nodes: LocalNodes) -> None:
        self._arm = arm
        self._nodes = nodes
        self._moments = random.Random(0)
        self._agents: dict[int, int] = {}

    def grow(self) -> None:
        """Have two nodes, and wait until both train and are saved."""
        if len(self._agents) == 1:
            places = {0: Place(node="", trainer=0, agent=self._agents[0])}
            self._nodes.resize(places, WORLD_SIZE)
        while len(self._agents) < WORLD_SIZE:
            self._nodes.tend()
            self._hear(lambda line: line["kind"] in ("step", "training"))
        self._hear(lambda line: line["kind"] == "saved")

    def lose(self, rank: int, kill: Callable[[int], None]) -> dict[str, float]:
        """Kill something of a rank. Returns the seconds of every part, up to the end of the next step."""
        for _ in range(_STEPS_BETWEEN):
            self._hear(lambda line: line["kind"] == "step")
        time.sleep(self._moments.uniform(0, 0.5))
        began = time.time()
        kill(self._agents[rank])
        lines = self._hear(lambda line: line["kind"] == "training" and line["time_s"] > began)
        assert lines[-1]["step"] > 0, f"started from the beginning: {lines}"
        lines += self._hear(lambda line: line["kind"] == "step")
        return _split(began, [line for line in lines if line["time_s"] > began])

    def _hear(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        lines = self._arm.wait_for(wanted, timeout_s=300)
        for line in lines:
            if line["kind"] == "attempt":
                self._agents = {}
            elif line["kind"] == "trainer":
                self._agents[line["rank"]] = line["agent_pid"]
        return lines


def _split(began: float, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    seconds = {}
    for part, kind in _PARTS.items():
        end = max(line["time_s"] for line in lines if line.get("stage", line["kind"]) == kind)
        seconds[part], began = end - began, end
    return seconds


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _start_bare(checkpoint: Path, modules: Sequence[str]) -> float:
    """Seconds until both processes are ready to build a model."""
    port, began = free_port(), time.monotonic()
    command = [sys.executable, "-m", "bench.bare_start"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(checkpoint), *modules],
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD_SIZE)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n", "a bare start failed"
    seconds = time.monotonic() - began
    for process in processes:
        process.communicate()
    return seconds


def _medians(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.median(parts[part] for parts in losses) for part in losses[0]}
