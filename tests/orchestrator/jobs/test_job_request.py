"""Where the job of a config keeps its run: the same place, although it starts in another folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from orchestrator.config import load_config, run_url
from orchestrator.jobs.job_request import Source, place_storage, prepare
from tests.trainers.tiny import tiny_config
from trainers.errors import ConfigError

PEER = {"url": "peer://", "every": 5, "keep": 2}


def write_config(folder: Path, tier: str) -> Path:
    config = {**tiny_config(), "run": {"name": "run"}}
    config["checkpoint"] = {"tiers": [PEER, {"url": tier, "every": 500, "keep": 9}]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("tier", ["s3://bucket/runs", "s3://bucket/\U0001f600 \u00e9", "ABSOLUTE"])
def test_a_job_finds_the_tier_from_its_own_folder(tmp_path, monkeypatch, tier):
    tier = str(tmp_path / "kept") if tier == "ABSOLUTE" else tier
    config, elsewhere = write_config(tmp_path, tier), tmp_path / "elsewhere"
    source = Source(
        config=load_config(config),
        path=config,
        overrides=(),
        working_dir="s3://bucket/working_dir.zip",
        environment={},
        command="unbroken",
    )
    request, _ = prepare(source, 1, tmp_path)
    assert request.run_url == f"{tier}/run"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    program, verb, path, *overrides = shlex.split(request.entrypoint)
    assert (program, verb) == ("unbroken", "train") and run_url(load_config(Path(path), overrides)) == f"{tier}/run"


def test_a_tier_in_a_relative_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(write_config(tmp_path, "kept"))
    assert run_url(config) == str(tmp_path / "kept" / "run"), "without submit it works"
    with pytest.raises(ConfigError, match=f"the tier kept is found from one folder only; give {tmp_path / 'kept'}"):
        place_storage(config, 1)
