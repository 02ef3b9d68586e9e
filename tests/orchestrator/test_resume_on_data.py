"""A run on tar shards: killed, gone on with by other numbers of workers and threads, and the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Ending
from orchestrator.prove import prove
from tests.orchestrator.agent_processes import make_spec, run_agents
from tests.orchestrator.test_agents import Script
from tests.trainers.data import made_up
from tests.trainers.data.test_training import images_config

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

STEPS, EVERY = 6, 2
DATA = {"crop": "random", "flip": True, "buckets": {"multiple_of": 4, "max_ratio": 4.0}, "on_broken": "skip"}


def config(path: Path, **data: Any) -> dict[str, Any]:
    plain = images_config(path, "webdataset", **DATA, **data)
    return {**plain, "train": {**plain["train"], "num_steps": STEPS}}


def test_a_kill_and_other_workers_make_no_difference(tmp_path: Path) -> None:
    path = made_up.write_tars(tmp_path / "shards", 11)
    shard = path / "b.tar"
    shard.write_bytes(shard.read_bytes().replace(made_up.encoded(8), b"x" * len(made_up.encoded(8))))
    alone, killed = Script(), Script(("step", {"step": 3}, [1]))
    assert run_agents(make_spec(tmp_path / "straight", config(path), EVERY), 1, alone).ending is Ending.FINISHED
    ahead = config(path, num_workers=1, prefetch=2)
    assert run_agents(make_spec(tmp_path / "killed", ahead, EVERY), 2, killed).ending is Ending.FINISHED
    assert killed.done() and not killed.of("replay_differs")
    proof = prove(Store.open(str(tmp_path / "straight")), Store.open(str(tmp_path / "killed")))
    assert proof.equal and proof.last.step == STEPS, proof.first_difference
    (named,) = alone.of("broken_samples")
    assert "b.tar, sample 08 can not be read as an image" in named["samples"][0]
    assert [event["samples"] for event in killed.of("broken_samples")] == [named["samples"]]

    made_up.write_tars(tmp_path / "others" / "shards", 12)
    longer = config(tmp_path / "others" / "shards")
    longer["train"]["num_steps"] = STEPS + 2
    outcome = run_agents(make_spec(tmp_path / "straight", longer, EVERY), 1, Script())
    assert (
        outcome.ending is Ending.CONFIG and "the data is not the one that the run was trained with" in outcome.message
    )
