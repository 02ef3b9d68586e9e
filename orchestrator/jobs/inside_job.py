"""What `unbroken train` looks at when Ray's job server started it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.config import RunConfig
from orchestrator.credentials import refuse_secrets
from trainers.errors import ConfigError

GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds from SIGTERM to SIGKILL when a job is stopped; its supervisor reads it from the job's own environment."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PACKAGES = "working_dir_files"
_RAYS_GRACE_S = 3
_END_S = 15


def check_job(environment: Mapping[str, str], folder: Path, config: RunConfig) -> Iterator[str]:
    """Yield what the user should know about the job that we are; nothing outside of a job.

    Args:
        environment: of this process.
        folder: that this process is in.

    Raises:
        ConfigError: a secret is in the job's runtime environment, or the run would be stored in a folder that Ray
            deletes.
    """
    if _JOB_CONFIG not in environment:
        return
    runtime_env = json.loads(environment[_JOB_CONFIG]).get("runtime_env") or {}
    refuse_secrets(runtime_env.get("env_vars", {}), "env_vars of the job's runtime environment")
    storage = config.storage_url
    if _PACKAGES in folder.parts and "://" not in storage and not Path(storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage={storage} is relative, and the job runs in a copy of the working directory that Ray deletes;"
            " set storage to a URL (s3://bucket/prefix) or to an absolute path that all nodes share"
        )
    granted_s = int(environment.get(GRACE_VARIABLE, _RAYS_GRACE_S))
    if granted_s < config.run.grace_s:
        yield (
            f"warning: `ray job stop` kills this job {granted_s} s after SIGTERM, before the {config.run.grace_s:g} s"
            " of run.grace_s for a last checkpoint are over; submit it with --runtime-env-json"
            f' \'{{"env_vars": {{"{GRACE_VARIABLE}": "{granted(config)}"}}}}\' or with `unbroken submit`'
        )


def granted(config: RunConfig) -> int:
    """Seconds that a stopped job of `config` should have: its last save, and the end of its processes."""
    return math.ceil(config.run.grace_s) + _END_S
