"""Meta's torch_checkpointing: a `CheckpointManager` that stages in a thread and writes from a background process.

Its settings are what it documents for hosts without CUDA: shared memory, kept and used again. It commits by a barrier
and a rename, and waits for no fsync. Its direct I/O is off: torch.save writes to it in pieces of any size, which ext4
refuses (EINVAL, seen with 0.1.1); it falls back by itself only where a file cannot be opened for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch_checkpointing import CheckpointManager  # pyright: ignore[reportMissingImports]
from torch_checkpointing.checkpoint_process import CheckpointProcessConfig  # pyright: ignore[reportMissingImports]
from torch_checkpointing.config import AsyncCheckpointSaverConfig  # pyright: ignore[reportMissingImports]
from torch_checkpointing.staging import CheckpointStagerConfig  # pyright: ignore[reportMissingImports]
from torch_checkpointing.storage.filesystem import (  # pyright: ignore[reportMissingImports]
    LocalFileSystemStorageConfig,
)


class ManagerSaves:
    """Saves and restores a trainer's DTensors, of each part of the state (model, optimizer, EMA) a file a rank."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Args: tensors: by the names that `TrainState.tensors` gives. Collective: all ranks."""
        self._items: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            self._items.setdefault(name.split("/")[0], {})[name] = value
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        process = CheckpointProcessConfig(subprocess_init_timeout_secs=600)  # it imports torch; its 30 s can be too few
        config = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging, process_config=process),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self._manager = CheckpointManager(config)

    def save(self, scratch: Path) -> Iterator[None]:
        written = self._manager.save(str(scratch / "state"), self._items)  # renamed to that: it must not be there
        assert written is not None, "it saves in the background"
        yield
        with self._manager.lock():  # what its users hold while they change the state
            pass
        yield
        written.result()

    def load(self, scratch: Path) -> None:
        self._manager.load(str(scratch / "state"), into=self._items, strict=True)
