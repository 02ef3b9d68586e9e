"""Two nodes, one, two again: an elastic run under a real Ray cluster of several nodes, bitwise the straight run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.checkpoint.store import Store
from orchestrator.config import load_config, trainer_dict
from orchestrator.messages.attempts import Ending
from orchestrator.prove import prove
from tests.orchestrator.agent_processes import make_spec, run_agents
from tests.orchestrator.independent import assert_same_state
from tests.orchestrator.local_cluster import LocalCluster
from tests.orchestrator.test_train import Driver, write_config

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = LocalCluster()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.close()


STEPS, EVERY = 160, 20


def test_a_node_lost_and_one_added(cluster: LocalCluster, tmp_path: Path) -> None:
    _, doomed = cluster.add_node(), cluster.add_node()
    path = write_config(tmp_path)
    overrides = (f"train.num_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "workers={min: 1, max: 2}")
    driver = Driver(cluster.folder, path, *overrides)
    try:
        driver.until("attempt 1: 2 workers")
        driver.until("newest stable checkpoint: step")
        cluster.cut_power(doomed)
        driver.until("attempt 2: 1 worker, from checkpoint")
        driver.until("goes on from step")
        cluster.add_node()
        driver.until("there is room for 2 workers instead of 1: saving and stopping at the next checkpoint")
        saved = int(driver.until(r"room for 2 workers.*: step (\d+) is saved").group(1))
        driver.until(r"attempt \d+: 2 workers, from checkpoint")
        resumed = int(driver.until(r"goes on from step (\d+)").group(1))
        assert saved == resumed and saved % EVERY == 0, "growing costs no step"
        assert driver.end() == 0, "".join(driver.lines)
    finally:
        driver.process.kill()
    config = load_config(path, overrides[:1])
    spec = make_spec(tmp_path / "straight", trainer_dict(config), STEPS)
    assert run_agents(spec, 1, lambda _: None).ending is Ending.FINISHED
    proof = prove(Store.open(str(tmp_path / "run")), Store.open(str(tmp_path / "straight")))
    assert proof.equal and proof.last.step == STEPS
    assert_same_state(tmp_path / "run", tmp_path / "straight")
