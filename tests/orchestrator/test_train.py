"""`unbroken train` under a real Ray cluster: everything on this machine, killed from outside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.checkpoint.store import Store
from orchestrator.processes import birth, command, descendants, parent
from orchestrator.tracking.goodput import account
from orchestrator.tracking.record import read_events
from orchestrator.tracking.streaming import read_metrics
from tests.orchestrator.independent import assert_same_state
from tests.trainers.tiny import tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

STEPS, EVERY = 40, 5
PROGRAM = ("-m", "orchestrator")
_BROKEN = """
from orchestrator import cli, driver

def agent(arguments):
    raise OSError("this node is broken")

driver.agent = agent
cli.main()
"""
_CONTROLLING = re.compile("ray::(TrainController|PlacementGroupCleaner)")
_BESIDE = re.compile("ray::_(Mailbox|Directory)")
PIDS = re.compile(r"attempt (\d+): rank (\d+) trains in process (\d+) \(agent (\d+)\)")


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Ray's own folder; short, because it holds sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ub-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def write_config(folder: Path, **sections: Any) -> Path:
    # Steps of some 50 ms: slow enough to kill inside, quick enough to wait for.
    config = tiny_config(train={"num_steps": STEPS, "global_batch_size": 64, "microbatch_size": 16}, **sections)
    config |= {"run": {"name": "run"}, "storage": str(folder), "workers": 2, "checkpoint": {"every_steps": EVERY}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Driver:
    """`unbroken train` as a process, its lines read as they come."""

    def __init__(self, ray_folder: Path, config: Path, *overrides: str, program: Sequence[str] = PROGRAM) -> None:
        environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *program, "train", str(config), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self.trainers: dict[int, int] = {}
        self.agents: dict[int, int] = {}
        self.attempt = 0

    def until(self, pattern: str) -> re.Match[str]:
        """Read on to the first line that matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := PIDS.search(line):
                self.attempt, rank, trainer, agent = map(int, found.groups())
                self.trainers[rank], self.agents[rank] = trainer, agent
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended with {self.process.wait()} before {pattern!r}:\n{''.join(self.lines)}")

    def end(self) -> int:
        assert self.process.stdout is not None
        with self.process.stdout as rest:
            self.lines += rest
        return self.process.wait()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    driver = Driver(ray_folder, write_config(folder))
    assert driver.end() == 0, "".join(driver.lines)
    return folder / "run"


def prove(a: Path, b: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", "prove", str(a), str(b)]
    return subprocess.run(command, text=True, capture_output=True, check=False)


def test_trainers_agents_and_driver_killed(straight: Path, ray_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    driver = Driver(ray_folder, config, "checkpoint.every_steps=5")
    driver.until("goes on from step 0")
    os.kill(driver.trainers[1], signal.SIGKILL)
    driver.until("stable checkpoint: step 5|goes on from step")
    driver.until("newest stable checkpoint: step")
    os.kill(driver.agents[1], signal.SIGKILL)
    driver.until(r"the agent or its node is gone|attempt 3: ")
    driver.until("goes on from step")
    assert parent(driver.trainers[0]) == parent(driver.trainers[1]), "both from the warm process of the node"
    for rank in (0, 1):
        os.kill(driver.agents[rank], signal.SIGKILL)
    driver.until("goes on from step")
    doomed = [*driver.trainers.values(), *driver.agents.values()]
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.end()
    again = Driver(ray_folder, config)
    assert again.end() == 0, "".join(again.lines)
    assert "goes on from step 0" not in "".join(again.lines)
    assert [pid for pid in doomed if birth(pid) is not None] == [], "nothing is left of the first driver"
    proof = prove(tmp_path / "run", straight)
    assert proof.returncode == 0 and "bitwise the same" in proof.stdout, proof
    assert_same_state(tmp_path / "run", straight)
    assert_same_record(tmp_path / "run", straight)


def assert_same_record(run: Path, straight: Path) -> None:
    """Every step once, with bitwise the numbers of the run that nothing happened to; and every second accounted for."""
    rows, expected = (list(read_metrics(Store.open(str(folder)))) for folder in (run, straight))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other in zip(rows, expected, strict=True):
        assert [(row[name], row["step"]) for name in ("loss", "grad_norm")] == [
            (other[name], row["step"]) for name in ("loss", "grad_norm")
        ]
    events = read_events(Store.open(str(run)))
    goodput = account(events)
    assert goodput.wall_s == events[-1].time_s - events[0].time_s
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, rel=0.01)
    assert "killed" in {recovery.cause for recovery in goodput.recoveries}
    assert goodput.attempts == len(list((run / "attempts").iterdir())) >= 4
    seconds = {str(bucket): total for bucket, total in goodput.seconds.items()}
    assert min(seconds[name] for name in ("productive", "stall", "detect", "restart", "start", "down")) > 0


def test_the_controller_and_what_cleans_up_after_it_killed(straight: Path, ray_folder: Path, tmp_path: Path) -> None:
    """At once, as Ray's memory monitor does: nobody is left who gives back the room of the agents."""
    driver = Driver(ray_folder, write_config(tmp_path))
    driver.until("newest stable checkpoint: step")
    doomed = [pid for pid in descendants(driver.process.pid) if _CONTROLLING.match(command(pid))]
    assert len(doomed) == 2
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in doomed:
            os.kill(pid, number)
    driver.until("Ray Train ended without an outcome.*starting Ray Train again")
    assert driver.end() == 0, "".join(driver.lines)
    assert "attempt 2: 2 workers" in "".join(driver.lines)
    assert_same_state(tmp_path / "run", straight)


def test_what_is_frozen_for_a_while(straight: Path, ray_folder: Path, tmp_path: Path) -> None:
    """As by a debugger or a suspended machine: an agent is replaced and ended, a driver or controller is only late."""
    driver = Driver(ray_folder, write_config(tmp_path))
    driver.until("newest stable checkpoint: step")
    frozen = driver.agents[1]
    os.kill(frozen, signal.SIGSTOP)
    driver.until("rank 1: the agent or its node is gone")
    driver.until("goes on from step")
    assert birth(frozen) is None, "it does not wake up beside who took its place"
    late = [driver.process.pid, *(pid for pid in descendants(driver.process.pid) if _CONTROLLING.match(command(pid)))]
    for pid in late:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(12.0)  # longer than anybody may be silent who is watched
    for pid in late:
        os.kill(pid, signal.SIGCONT)
    assert driver.end() == 0, "".join(driver.lines)
    assert "attempt 3" not in "".join(driver.lines)
    assert_same_state(tmp_path / "run", straight)


def test_what_the_driver_has_beside_it_killed(straight: Path, ray_folder: Path, tmp_path: Path) -> None:
    """What carries its events, and what knows the memory of the nodes: every group of agents asks both first."""
    tiers = f"[{{url: 'peer://', every: 2, keep: 2}}, {{url: '{tmp_path}', every: {EVERY}, keep: 9}}]"
    config = yaml.safe_load(write_config(tmp_path).read_text()) | {"checkpoint": {"tiers": yaml.safe_load(tiers)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    driver = Driver(ray_folder, tmp_path / "config.yaml")
    driver.until("newest stable checkpoint: step")
    doomed = [pid for pid in descendants(driver.process.pid) if _BESIDE.match(command(pid))]
    assert len(doomed) == 2
    for pid in (*doomed, driver.agents[1]):
        os.kill(pid, signal.SIGKILL)
    driver.until("attempt 2: 2 workers")
    assert driver.end() == 0, "".join(driver.lines)
    assert f"finished: step {STEPS} is done" in "".join(driver.lines)
    assert_same_state(tmp_path / "run", straight)


def test_agents_that_can_not_begin_end_the_run(ray_folder: Path, tmp_path: Path) -> None:
    driver = Driver(ray_folder, write_config(tmp_path), "failures.agents=2", program=("-c", _BROKEN))
    assert driver.end() == 4, "".join(driver.lines)
    why = r"2 groups of agents in a row ended before they had begun an attempt \(failures.agents=2\)"
    # Ray may see one of the two fail first, and may have the last word.
    assert re.search(rf"{why}; last, rank [01]: OSError: this node is broken", "".join(driver.lines)), driver.lines


def test_sigterm_saves_the_step_under_way(straight: Path, ray_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    driver = Driver(ray_folder, config, "checkpoint.every_steps=1000")
    driver.until(rf"step \d+/{STEPS}  loss")
    driver.process.terminate()
    assert driver.end() == 143, "".join(driver.lines)
    (saved,) = re.findall(r"interrupted: SIGTERM: step (\d+) is saved", "".join(driver.lines))
    driver = Driver(ray_folder, config, "checkpoint.every_steps=1000", "workers=1")
    assert driver.end() == 0 and f"goes on from step {saved}\n" in "".join(driver.lines)
    assert_same_state(tmp_path / "run", straight)


def test_a_finished_run_says_so_and_another_config_is_refused(straight: Path, ray_folder: Path) -> None:
    config = straight.parent / "config.yaml"
    driver = Driver(ray_folder, config, "workers=1", "parallel.strategy=ddp")
    assert driver.end() == 0 and f"finished: step {STEPS} of {STEPS}" in "".join(driver.lines)
    driver = Driver(ray_folder, config, "optimizer.lr=0.5", "seed=8")
    assert driver.end() == 2
    assert "optimizer.lr" in driver.lines[-1] and "seed" in driver.lines[-1] and len(driver.lines) == 1


def test_a_larger_num_steps_goes_on(straight: Path, ray_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(straight.parent, tmp_path / "copy")
    config = write_config(tmp_path / "copy")
    driver = Driver(ray_folder, config, f"train.num_steps={STEPS + 5}", "workers=3")
    assert driver.end() == 0, "".join(driver.lines)
    assert f"goes on from step {STEPS}" in "".join(driver.lines)
    assert prove(tmp_path / "copy" / "run", straight).returncode == 0
