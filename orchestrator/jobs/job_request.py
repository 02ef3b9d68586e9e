"""From a checked config to the job that trains it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import RunConfig, override, run_url, to_dict
from orchestrator.credentials import refuse_secrets
from orchestrator.jobs.inside_job import GRACE_VARIABLE, granted
from orchestrator.jobs.job_server import MAX_PACKAGE_BYTES, JobRequest, ignore_rules
from orchestrator.jobs.working_dir import pack
from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a job is made from."""

    config: RunConfig
    path: Path
    """The file of the config."""
    overrides: Sequence[str]
    """What the file was loaded with."""
    working_dir: str
    """A folder here, or the URI of a zip file."""
    environment: Mapping[str, str]
    command: str
    """How the cluster calls unbroken."""

    def __post_init__(self) -> None:
        refuse_secrets(self.environment, "--env")
        if "://" not in self.working_dir and not Path(self.working_dir).is_dir():
            raise ConfigError(f"--working-dir {self.working_dir} is no folder; give the one that has your configs")


def prepare(source: Source, num_nodes: int, scratch: Path) -> tuple[JobRequest, list[str]]:
    """The job, and lines that the user should read.

    Args:
        num_nodes: of the cluster.
        scratch: folder for the packed working directory; it is needed as long as the job is to be submitted.

    Raises:
        ConfigError: it cannot be submitted; nothing was.
    """
    storage, note = place_storage(source.config, num_nodes)
    notes = [note] if note else []
    package, config = source.working_dir, str(source.path)
    if "://" not in package:
        packed = pack(Path(package), source.path, scratch / "working_dir.zip", ignore_rules, MAX_PACKAGE_BYTES)
        notes.append(f"packed {Path(package).resolve()}: {packed.num_files} files, {packed.size_bytes / 1e6:,.1f} MB")
        package, config = str(packed.path), packed.config
    overrides = [text for text in source.overrides if not text.startswith("storage=")]
    digest = hashlib.sha256(json.dumps(to_dict(source.config), sort_keys=True).encode()).hexdigest()
    grace_s = granted(source.config)
    request = JobRequest(
        run_url=run_url(source.config),
        config_digest=digest[:16],
        entrypoint=f"{source.command} train {shlex.join([config, *overrides, override('storage', storage)])}",
        package=package,
        environment={**source.environment, GRACE_VARIABLE: str(grace_s)},
        grace_s=grace_s,
    )
    return request, notes


def place_storage(config: RunConfig, num_nodes: int) -> tuple[str, str | None]:
    """Where the job of `config` keeps its run.

    Returns:
        `storage` as the job must be told, since it runs in another folder; and what the user should know, if anything.

    Raises:
        ConfigError: a relative path on a cluster of several nodes, or of a tier.
    """
    storage, tier = config.storage_url, config.checkpoint.storage
    if "://" in storage:
        return storage, None
    absolute = run_url(config).removesuffix(f"/{config.run.name}")
    if tier is not None and tier.url != absolute:
        raise ConfigError(f"the tier {tier.url} is found from one folder only; give {absolute}, or a URL")
    if num_nodes <= 1:
        return absolute, f"the run is in {absolute}/{config.run.name}, on the cluster's machine"
    if not Path(storage).expanduser().is_absolute():
        raise ConfigError(
            f"storage={storage} is a folder of one machine, and the cluster has {num_nodes} nodes; set"
            " storage=s3://bucket/prefix, or the absolute path of a file system that all nodes mount"
        )
    return absolute, f"warning: {absolute} must be one file system that all {num_nodes} nodes mount"
