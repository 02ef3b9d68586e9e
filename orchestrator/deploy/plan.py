"""The figures of a deployment: from one config, so that they agree; and what contradicts itself, refused."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.config import RunConfig
from orchestrator.doctor import StateSize
from trainers.data.config import DataConfig
from trainers.errors import ConfigError

COMPONENTS = ("gcs-fault-tolerance", "kueue", "prometheus", "retention", "s3-role", "s3-secret", "spot", "token-auth")
"""What can be added to the RayJob; `autoscaling` follows from `workers`."""
TARGETS = ("aws", "compose", "kuberay", "s3", "skypilot", "slurm", "systemd")

_NOTICE_S = 10.0
"""Ray Train looks for notices every 5 s, and the step that runs is finished first."""
_LONGEST_SPOT_NOTICE_S = 120
"""AWS gives two minutes, Google and Azure half a minute."""
_PROCESS_BYTES = 1 << 30
"""Agent, fork server and trainer of one worker with torch and diffusers imported: some 0.7 GB, rounded up."""
_UNSAFE = re.compile(r"[\s\"'$#]")
_MAX_NAME = 47
"""The RayJob operator derives longer names of pods and services from the job's."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The nodes of a run, and what each has."""

    min_nodes: int
    max_nodes: int
    node_cpus: int
    node_gpus: int
    save_s: int
    """Seconds that one save may take with the fewest nodes: notice, writing, reading back."""
    node_bytes: int
    """Memory that a node needs when there are the fewest."""


def make_plan(config: RunConfig, size: StateSize) -> Plan:
    """The figures that follow from a config, whether they can be satisfied or not."""
    per_node = config.deploy.workers_per_node
    min_nodes = math.ceil(config.min_workers / per_node)
    rate = config.deploy.store_mb_per_s * 1e6 * min_nodes
    trained = 0 if config.resources.gpu else size.total + size.parameters  # with a GPU, they are in its memory
    on_node = trained * per_node if config.parallel.strategy == "ddp" else math.ceil(trained / min_nodes)
    return Plan(
        min_nodes=min_nodes,
        max_nodes=math.ceil(config.max_workers / per_node),
        node_cpus=max(1, math.ceil(config.resources.cpu * per_node)),
        node_gpus=math.ceil(config.resources.gpu * per_node),
        save_s=math.ceil(_NOTICE_S + 2 * size.total / rate),
        node_bytes=on_node + math.ceil(size.total / min_nodes) + per_node * _PROCESS_BYTES,
    )


def check(config: RunConfig, plan: Plan, target: str, components: Collection[str] = ()) -> None:
    """Refuse what cannot work on `target`.

    Raises:
        ConfigError: one line: the key, its value, what it contradicts, what to do.
    """
    deploy = config.deploy
    _check_storage(config, target)
    if target == "s3":
        return
    if deploy.retries == 0 and target not in ("aws", "skypilot"):  # these count nothing
        raise ConfigError(
            "deploy.retries=0, but the node of the driver can be lost, and then nothing starts it again;"
            " set at least 1: a retry goes on from the newest stable checkpoint"
        )
    if deploy.grace_s < plan.save_s:
        raise ConfigError(
            f"deploy.grace_s={deploy.grace_s} is shorter than a save, which takes up to {plan.save_s} s on"
            f" {plan.min_nodes} node(s) at deploy.store_mb_per_s={deploy.store_mb_per_s:g};"
            f" set deploy.grace_s={plan.save_s} or more, or correct store_mb_per_s (`unbroken doctor` measures it)"
        )
    if (target == "aws" or "spot" in components) and deploy.grace_s > _LONGEST_SPOT_NOTICE_S:
        raise ConfigError(
            f"deploy.grace_s={deploy.grace_s}, but a spot node is gone {_LONGEST_SPOT_NOTICE_S} s after its notice;"
            f" set deploy.grace_s={_LONGEST_SPOT_NOTICE_S} or less"
        )
    needed_gib = plan.node_bytes / 2**30
    if deploy.memory_gib < needed_gib:
        raise ConfigError(
            f"deploy.memory_gib={deploy.memory_gib} is less than the {needed_gib:.1f} GiB that a node needs when there"
            f" are {plan.min_nodes}; set deploy.memory_gib={math.ceil(needed_gib)} or raise the fewest workers"
        )
    if target != "compose" and _is_relative(config.data):
        raise ConfigError(
            f"data.path={config.data.path} is relative, but workers start in folders of their own;"
            " give the absolute path at which every node has the images"
        )
    if target == "skypilot" and plan.node_gpus and deploy.accelerator is None:
        raise ConfigError(
            f"deploy.accelerator=null, but resources.gpu={config.resources.gpu:g}: SkyPilot asks for a GPU by its name;"
            " set deploy.accelerator=L4, or what you have"
        )
    _check_components(config, components)


def _is_relative(data: DataConfig) -> bool:
    if data.path is None or "://" in data.path or data.source == "datasets":  # the last may be a name on the hub
        return False
    return not Path(data.path).is_absolute()


def _check_storage(config: RunConfig, target: str) -> None:
    storage = config.storage_url
    if _UNSAFE.search(storage):
        raise ConfigError(
            f"storage={storage!r} has a blank, a quote, '$' or '#', which not all of the files can take; rename it"
        )
    scheme = storage.partition("://")[0] if "://" in storage else "file"
    if scheme in ("file", "local"):
        if target != "s3" and config.deploy.shared_storage:
            if Path(storage.removeprefix(f"{scheme}://")).is_absolute():
                return
            raise ConfigError(f"storage={storage} is relative, but every node must find it; give the absolute path")
        instead = "give a bucket: storage=s3://bucket/prefix"
        if target != "s3":
            instead += ", or set deploy.shared_storage=true if every node mounts that path"
        raise ConfigError(f"storage={storage} is local to one machine, so its checkpoints are lost with it; {instead}")
    if scheme == "memory":
        raise ConfigError(f"storage={storage} is gone with its process; give a bucket: storage=s3://bucket/prefix")
    if target == "s3" and scheme not in ("s3", "s3a"):
        raise ConfigError(
            f"storage={storage} is no S3 bucket, and the policies are S3's; give storage=s3://bucket/prefix"
        )


def _check_components(config: RunConfig, components: Collection[str]) -> None:
    if "kueue" in components and config.min_workers != config.max_workers:
        raise ConfigError(
            f"workers={{min: {config.min_workers}, max: {config.max_workers}}} needs an autoscaler, and Kueue takes no"
            f" job with one: it admits a whole gang; set workers={config.max_workers}, or leave kueue out"
        )
    if {"s3-role", "s3-secret"} <= set(components):
        raise ConfigError("s3-role and s3-secret are two ways of the same; give one: a role if the cluster has them")
    if "retention" in components and config.checkpoint.retention.last is not None:
        raise ConfigError(
            f"checkpoint.keep.last={config.checkpoint.retention.last} lets trainers delete, and so does retention;"
            " set checkpoint.keep.last=null, or leave retention out"
        )


def job_name(run_name: str) -> str:
    """The run's name as Kubernetes takes it: lower case, '-' for '.' and '_', a letter first.

    Raises:
        ConfigError: it is too long.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    name = name if name[0].isalpha() else f"run-{name}"
    if len(name) > _MAX_NAME:
        raise ConfigError(f"run.name={run_name} is too long for a cluster; use at most {_MAX_NAME} characters")
    return name


def figures(config: RunConfig, plan: Plan, components: Collection[str] = ()) -> Mapping[str, str | None]:
    """What is written at each mark `# <- name` of the files in `deploy/`; None: nothing, without the line."""
    deploy = config.deploy
    elastic = plan.min_nodes < plan.max_nodes
    chosen = (["autoscaling"] if elastic else []) + sorted(components)
    return {
        "job_name": job_name(config.run.name),
        "run_url": f"{config.storage_url.rstrip('/')}/{config.run.name}",
        "image": deploy.image,
        "docker_image": f"docker:{deploy.image}",
        "bucket": bucket_and_prefix(config.storage_url)[0],
        "min_nodes": str(plan.min_nodes),
        "max_nodes": str(plan.max_nodes),
        "nodes": f"{plan.min_nodes}-{plan.max_nodes}" if elastic else str(plan.max_nodes),
        "node_cpus": str(plan.node_cpus),
        "node_gpus": str(plan.node_gpus),
        "at_least_cpus": f"{plan.node_cpus}+",
        "at_least_memory": f"{deploy.memory_gib}+",
        "memory": f"{deploy.memory_gib}Gi",
        "memory_g": f"{deploy.memory_gib}G",
        "grace_s": str(deploy.grace_s),
        "grace": f"{deploy.grace_s}s",
        "drain_s": str(max(1, deploy.grace_s - 5)),  # Ray is told a little less than there is
        "warning": f"B:USR1@{deploy.grace_s}",
        "retries": str(deploy.retries),
        "on_failure": f"on-failure:{deploy.retries}",
        "instance_type": deploy.instance_type,
        "accelerators": f"{deploy.accelerator}:{plan.node_gpus}" if plan.node_gpus else None,
        "components": f"[{', '.join(f'components/{name}' for name in chosen)}]",
    }


def bucket_and_prefix(storage: str) -> tuple[str, str]:
    """Of an S3 URL; the prefix may be empty."""
    parts = urlsplit(storage)
    return parts.netloc, parts.path.strip("/")
