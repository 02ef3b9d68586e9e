"""The section `deploy` of a config: facts about the cluster that no other key knows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from trainers.errors import ConfigError

_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]*")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True, kw_only=True)
class DeployConfig:
    """What `unbroken deploy render` writes into files; training itself does not read it."""

    image: str = "unbroken:0.1.0"
    """Container image with this package, as `docker pull` takes it."""
    workers_per_node: int = 1
    """Workers on one node, >= 1: usually its number of GPUs."""
    memory_gib: int = 16
    """GiB of memory of a node, >= 1, of which state, gradients and snapshots need their share."""
    grace_s: int = 60
    """Seconds from the notice that a node goes away to its end, >= 1; at least as long as a save takes."""
    store_mb_per_s: float = 100.0
    """MB/s between one node and the store, > 0; `unbroken doctor` measures it."""
    retries: int = 100
    """How often a lost driver is started again, >= 0; exit codes 2, 4 and 6, which a retry cannot help, never are."""
    shared_storage: bool = False
    """`storage` is a path on a file system that every node mounts (NFS, Lustre)."""
    instance_type: str = "m7i.2xlarge"
    """EC2 instance type of the workers of `ray up`; it must have the CPUs, GPUs and memory that are asked for."""
    accelerator: str | None = None
    """SkyPilot's name of the GPU, such as L4 or H100; needed there if resources.gpu > 0."""

    def __post_init__(self) -> None:
        for key, least in (("workers_per_node", 1), ("memory_gib", 1), ("grace_s", 1), ("retries", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least {least}")
        if self.store_mb_per_s <= 0:
            raise ConfigError(f"store_mb_per_s={self.store_mb_per_s:g} must be above 0")
        # They are written into files of several syntaxes: a quote or a line break would make another file of them.
        if not _IMAGE.fullmatch(self.image):
            raise ConfigError(
                f"image={json.dumps(self.image)} is no image reference; give one such as registry/name:tag"
            )
        for key in ("instance_type", "accelerator"):
            value = getattr(self, key)
            if value is not None and not _WORD.fullmatch(value):
                raise ConfigError(f"{key}={json.dumps(value)} is no such name; use letters, digits, '.' and '-'")
