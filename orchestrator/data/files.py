"""Training data at any URL that storage can be at: what `trainers` reads it through."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from trainers.config import TrainerConfig
from trainers.data.files import Files, LocalFiles, local_files
from trainers.data.images import image_suffixes
from trainers.errors import ConfigError

_FILES = (".txt", ".json", ".jsonl", ".csv")
"""What is called so, or like an image, is no folder."""


class StoreFiles:
    """Files below a URL. Connections do not survive a fork: open it in the process that reads."""

    def __init__(self, url: str, opened: Callable[[str], Store] = Store.open) -> None:
        """Raises ConfigError: no such protocol, or credentials in the URL."""
        self.root = url
        try:
            self._store = opened(url)
        except ConfigError as error:
            raise ConfigError(str(error).replace("storage=", "data.path=", 1)) from error

    def exists(self, name: str | None) -> bool:
        return bool(self._store.list("")) if name is None else self._store.exists(name)

    def names(self, suffixes: tuple[str, ...]) -> list[str]:
        return sorted(self._below("", suffixes))

    def _below(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        found = []
        for name in self._store.list(folder):
            if name.startswith("."):
                continue
            path = f"{folder}/{name}" if folder else name
            if name.lower().endswith(suffixes):
                found.append(path)
            elif not name.lower().endswith((*image_suffixes(), *_FILES)):
                # A store does not say which of the names are folders. To ask for each text beside an image, or for each
                # image beside a text, would take a request each.
                found += self._below(path, suffixes)
        return found

    def size(self, name: str) -> int:
        return self._store.size(name)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= begin:
            return b""  # no range of bytes says that
        try:
            return self._store.read(name, begin or None, end)
        except MissingObjectError as error:
            raise FileNotFoundError(f"{self.root}/{name} is not there any more") from error


def with_absolute_paths(config: TrainerConfig) -> TrainerConfig:
    """`config` with local paths made absolute, for processes that start in other folders."""
    validation, metrics = config.validation, config.validation.metrics
    if metrics is not None:
        metrics = replace(metrics, network=_absolute(metrics.network), clip=_absolute(metrics.clip))
        validation = replace(validation, metrics=metrics)
    encoder = _absolute(config.conditioning.text_encoder)
    return replace(
        config,
        data=replace(config.data, path=_absolute(config.data.path)),
        conditioning=replace(config.conditioning, text_encoder=encoder),
        validation=validation,
    )


def _absolute(path: Any) -> Any:
    """`path`, absolute if it is one that is here: not None, a URL or a name on the hub."""
    return path if path is None or "://" in path or not os.path.exists(path) else os.path.abspath(path)


def data_files(path: str, opened: Callable[[str], Store] = Store.open) -> Files:
    """`FilesAt` for local paths and URLs.

    Args:
        opened: `Store.reach` for a command that a person waits for.
    """
    if path.startswith("file://"):
        return LocalFiles(path.removeprefix("file://"))
    return StoreFiles(path, opened) if "://" in path else local_files(path)
