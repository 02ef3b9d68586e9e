"""Section `tracking`: what it refuses, and where its files go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import RunConfig, to_dict
from orchestrator.run_identity import config_hash, conflicting_keys
from orchestrator.tracking import fan_out
from orchestrator.tracking.config import TrackingConfig, local_folder
from orchestrator.tracking.credentials import has_wandb_key
from tests.orchestrator.tiny_run import CONFIG
from trainers.decode import decode
from trainers.errors import ConfigError


def config(**tracking: Any) -> RunConfig:
    return decode(RunConfig, {**CONFIG, "tracking": tracking})


@pytest.mark.parametrize(
    ("tracking", "expected"),
    [
        ({"wandb": {}}, "tracking.wandb.project is missing"),
        ({"wandb": {"project": "a/b"}}, "tracking.wandb.project='a/b' is no W&B project"),
        ({"wandb": {"project": "p", "mode": "on"}}, 'tracking.wandb.mode="on" is not one of auto, online'),
        ({"wandb": {"project": "p", "api_key": "x"}}, "tracking.wandb.api_key"),
        ({"wandb": {"project": "p", "tags": [""]}}, "tracking.wandb.tags has ''"),
        ({"wandb": {"project": "p", "init_timeout_s": 0}}, "init_timeout_s=0 must be at least 1"),
        ({"wandb": {"project": "p", "best": {"metric": "fid", "mode": "low"}}}, "best.mode"),
        ({"dir": "s3://bucket/x"}, "tracking.dir='s3://bucket/x' is no local path"),
    ],
)
def test_refused(tracking: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config(**tracking)
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)


def test_off_unless_given_and_free_to_change() -> None:
    plain, tracked = config(), config(wandb={"project": "p"}, tensorboard=True, prometheus=True)
    assert not plain.tracking.wants_process and tracked.tracking.wants_process
    assert not config(wandb={"project": "p", "mode": "disabled"}).tracking.wants_process
    assert config(jsonl=True).tracking.wants_process
    assert conflicting_keys(to_dict(plain), tracked) == [] and config_hash(plain) == config_hash(tracked)


def test_local_folder(tmp_path: Path) -> None:
    assert local_folder(TrackingConfig(), f"{tmp_path}/run", "id") == tmp_path / "run" / "tracking"
    assert local_folder(TrackingConfig(dir=str(tmp_path)), "s3://bucket/run", "id") == tmp_path
    assert local_folder(TrackingConfig(), "s3://bucket/run", "id").name == "id"


def test_what_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    online = config(wandb={"project": "p", "mode": "online"}).tracking
    with pytest.raises(ConfigError, match="needs a key"):
        fan_out.check_tracking(online)
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    fan_out.check_tracking(online)
    monkeypatch.setattr(fan_out.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tensorboardX, which is not installed"):
        fan_out.check_tracking(config(tensorboard=True).tracking)
