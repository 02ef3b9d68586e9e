from __future__ import annotations

from typing import Any

from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.config import RunConfig, run_url, to_dict
from orchestrator.run_identity import config_hash, conflicting_keys
from orchestrator.sections import CheckpointConfig, RunSection, Tier
from tests.trainers.tiny import tiny_config
from trainers.config import TrainerConfig
from trainers.decode import decode


def test_tiers_take_the_place_of_storage_interval_and_number() -> None:
    tiers = (Tier(url="peer://", every=20, keep=2), Tier(url="/data/runs", every=100, keep=5))
    checkpoint = CheckpointConfig(tiers=tiers, keep=RetentionConfig(grace_s=1.0))
    assert (checkpoint.interval_steps, checkpoint.retention.last, checkpoint.retention.grace_s) == (100, 5, 1.0)
    due = {step: checkpoint.tiers_due(step, 1010) for step in (19, 20, 100, 1000, 1010)}
    assert due == {19: (), 20: ("peer",), 100: ("peer", "storage"), 1000: ("peer", "storage"), 1010: ("storage",)}
    trained = vars(decode(TrainerConfig, tiny_config()))
    config = RunConfig(run=RunSection(name="digits"), checkpoint=checkpoint, **trained)
    assert run_url(config) == "/data/runs/digits"


def test_an_interval_that_is_found_out_leaves_only_what_is_kept_for_good_and_the_end() -> None:
    checkpoint = CheckpointConfig(every_steps="auto", keep=RetentionConfig(every_steps=300))
    due = [step for step in range(1, 1001) if checkpoint.tiers_due(step, 1000)]
    assert checkpoint.automatic and due == [300, 600, 900, 1000]
    assert not CheckpointConfig().automatic and CheckpointConfig(every_steps="auto").tiers_due(999, 1000) == ()


def run_with(keep: int, **integrity: Any) -> RunConfig:
    checkpoint = {"every_steps": 100, "keep": {"last": keep}}
    return decode(RunConfig, tiny_config(run={"name": "digits"}, checkpoint=checkpoint, integrity=integrity))


def test_how_corruption_is_looked_for_decides_no_number() -> None:
    old, new = run_with(10), run_with(10, replicas_every=None, recompute_every=200)
    assert conflicting_keys(to_dict(old), new) == [] and config_hash(old) == config_hash(new)
    assert (old.rollback_steps, new.rollback_steps) == (20, 200)
