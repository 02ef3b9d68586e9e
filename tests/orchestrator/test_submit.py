"""Jobs of a real Ray cluster of three nodes: a node lost, a driver killed, stopped, gone on with, proved bitwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.chaos.nodes import raylet_above
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.jobs.job_server import Cluster
from orchestrator.messages.attempts import Event
from orchestrator.tracking.record import read_events
from tests.orchestrator.job_cluster import JobCluster, environment, until
from tests.orchestrator.straight_run import make_straight_run
from tests.trainers.tiny import tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

STEPS, EVERY = 100, 10
COMMAND = f"{sys.executable} -m orchestrator"


@pytest.fixture
def cluster() -> Iterator[JobCluster]:
    cluster = JobCluster(num_nodes=3)
    yield cluster
    cluster.close()


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


class Follower:
    """`unbroken submit --supervise`, in a thread of this process: another one would import all that is here again."""

    def __init__(self, *args: str) -> None:
        self.result: Result | None = None
        self._args = args
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.result = unbroken(*self._args)

    def check(self) -> None:
        assert self.result is None, self.result.output

    def end(self) -> Result:
        self._thread.join(240)
        assert self.result is not None
        return self.result


def newest_step(run: Path) -> int:
    """Of the checkpoints that are committed."""
    found = [int(path.parent.name.split("-")[0]) // 64 for path in run.glob("checkpoints/*/manifest.json")]
    return max(found, default=0)


def last_event(run: Path, kind: str, **fields: int) -> Event:
    events = read_events(Store.open(str(run)))
    return next(e for e in reversed(events) if e.kind == kind and fields.items() <= e.fields.items())


def lose_a_node(cluster: JobCluster, run: Path) -> None:
    """SIGKILL to the raylet of a node that is not the head's and has a worker."""
    nodes = {raylet_above(last_event(run, "trainer", rank=rank).fields["agent_pid"]) for rank in (0, 1)}
    assert len(nodes) == 2, "one CPU a node"
    os.kill((nodes - {cluster.head}).pop(), signal.SIGKILL)


def test_a_node_a_driver_and_a_job_are_lost_and_the_run_is_bitwise_the_same(
    cluster: JobCluster, tmp_path: Path
) -> None:
    numbers = tiny_config(train={"num_steps": STEPS, "global_batch_size": 64, "microbatch_size": 16})
    make_straight_run(str(tmp_path / "straight"), numbers, EVERY)  # while the nodes come up
    cluster.wait()
    name = f"run-{uuid.uuid4().hex[:6]}"  # a second try meets the jobs of the first one
    config = numbers | {"run": {"name": name}, "workers": 2, "checkpoint": {"every_steps": EVERY}}
    work, run = tmp_path / "work", tmp_path / "kept" / name
    work.mkdir()
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    where, storage = ("--address", cluster.address), f"storage={tmp_path / 'kept'}"

    submit = ("submit", str(work / "config.yaml"), storage, "--working-dir", str(work), "--command", COMMAND)
    follower = Follower(*submit, *where, "--supervise")
    until(lambda: newest_step(run) > 0, follower.check)
    lose_a_node(cluster, run)
    until(lambda: last_event(run, "training").fields["attempt"] > 1, follower.check)
    at = newest_step(run)
    until(lambda: newest_step(run) > at, follower.check)
    lost = last_event(run, "training").fields["attempt"]  # the node may have cost more than one
    os.kill(last_event(run, "started").fields["pid"], signal.SIGKILL)
    until(lambda: last_event(run, "training").fields["attempt"] > lost, follower.check)
    with pytest.raises(SystemExit, match="0"):  # not by CliRunner, which the other thread is in
        main.main(["stop", name, *where])
    followed = follower.end()
    assert followed.exit_code == 143, followed.output
    for words in (f"{name}-a1: submitted", f"{name}-a1 lost its driver (exit code 137)", f"{name}-a2: submitted"):
        assert words in followed.output
    stopped_at = newest_step(run)
    assert (
        at < stopped_at < STEPS
        and last_event(run, "interrupted").fields["kept"] == f"SIGTERM: step {stopped_at} is saved"
    )

    plain = [str(Path(sys.executable).with_name("ray")), "job", "submit", *where, "--working-dir", str(work)]
    plain += ["--submission-id", f"{name}-plain", "--", *COMMAND.split(), "train", "config.yaml", storage]
    done = subprocess.run(plain, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on from step {stopped_at}" in done.stdout and "before the 25 s of run.grace_s" in done.stdout
    jobs = [(job.id, job.status, job.exit_code) for job in Cluster.connect(cluster.address).jobs()]
    assert [job for job in jobs if job[0].startswith(name)] == [
        (f"{name}-a1", "FAILED", 137),
        (f"{name}-a2", "STOPPED", None),
    ], "what `ray job submit` put there is not ours"

    proof = unbroken("prove", str(run), str(tmp_path / "straight"))
    assert proof.exit_code == 0 and f"checkpoints up to step {STEPS}" in proof.stdout, proof.output
    seen = json.loads(unbroken("status", str(run), "--json").stdout)
    assert seen["state"] == "finished" and seen["restarts"] == 3, seen["recoveries"]
