"""A compiled model: killed while it compiles and afterwards, resumed by others, and still the same bits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Ending
from orchestrator.prove import prove
from tests.orchestrator.agent_processes import PRELOAD, make_spec, run_agents
from tests.orchestrator.test_agents import Script
from tests.trainers.tiny import DIT, tiny_config

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("UNBROKEN_TEST_LONG" not in os.environ, reason="takes minutes: UNBROKEN_TEST_LONG=1"),
]


def test_killed_at_any_time_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    objective = {"prediction_type": "flow", "weighting": "none", "label_drop": 0.0}
    # Without a warm-up, as a DiT's blocks get gradients from the third update on only.
    config = tiny_config({**DIT, "compile": True}, objective=objective, schedule={"warmup_steps": 0})
    preload = (*PRELOAD, "diffusers:DiTTransformer2DModel", "torch._inductor.compile_fx")
    spec = replace(make_spec(tmp_path / "killed", config, every_steps=1), preload=preload)
    script = Script(("reached", {"stage": "built", "rank": 0}, [0]), ("saved", {"step": 2}, [1]))
    outcome = run_agents(spec, 2, script, timeout_s=1200)
    assert outcome is not None and outcome.ending is Ending.FINISHED and script.done()
    spec = replace(make_spec(tmp_path / "straight", config, every_steps=1), preload=preload)
    outcome = run_agents(spec, 1, Script(), timeout_s=1200)
    assert outcome is not None and outcome.ending is Ending.FINISHED
    proof = prove(Store.open(str(tmp_path / "killed")), Store.open(str(tmp_path / "straight")))
    assert proof.equal and proof.last.step == 4, proof.first_difference
