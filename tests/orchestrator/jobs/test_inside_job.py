from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.config import RunConfig
from orchestrator.jobs.inside_job import GRACE_VARIABLE, check_job
from tests.orchestrator.tiny_run import CONFIG
from trainers.decode import decode
from trainers.errors import ConfigError

COPY = Path("/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1")


def config(storage: str) -> RunConfig:
    return decode(RunConfig, CONFIG | {"storage": storage})


def job(**env_vars: str) -> dict[str, str]:
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": env_vars}, "metadata": {}})}


def test_nothing_is_said_outside_of_a_job_nor_in_one_that_is_well():
    assert list(check_job({"HF_TOKEN": "x"}, COPY, config("runs"))) == []
    well = job() | {GRACE_VARIABLE: "120"}
    assert list(check_job(well, COPY, config("s3://bucket/runs"))) == []
    assert list(check_job(well, COPY, config("/mnt/runs"))) == []
    assert list(check_job(well, Path("/home/me"), config("runs"))) == []


def test_a_secret_in_the_runtime_environment_is_refused_by_name():
    with pytest.raises(ConfigError, match="WANDB_API_KEY") as caught:
        list(check_job(job(WANDB_API_KEY="hunter2"), COPY, config("s3://bucket/runs")))
    assert "hunter2" not in str(caught.value)


def test_a_run_in_a_folder_that_ray_deletes_is_refused():
    with pytest.raises(ConfigError, match="storage=runs is relative"):
        list(check_job(job(), COPY, config("runs")))


def test_too_little_time_for_a_last_checkpoint_is_pointed_out():
    (note,) = check_job(job(), COPY, config("/mnt/runs"))
    assert "3 s after SIGTERM" in note and f'"{GRACE_VARIABLE}": "40"' in note
    (note,) = check_job(job() | {GRACE_VARIABLE: "20"}, COPY, config("/mnt/runs"))
    assert "20 s after SIGTERM, before the 25 s of run.grace_s" in note
