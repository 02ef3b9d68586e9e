"""Folders in diffusers form: which network they hold, and rows of its weights without reading the rest."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from trainers.errors import ConfigError

_WEIGHTS = "diffusion_pytorch_model"
_NETWORKS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class PretrainedFolder:
    """A pipeline folder with the network that is trained, or the folder of a network alone."""

    root: Path
    part: str | None
    """Sub-folder of the network, as the pipeline calls it (unet, transformer); None: `root` is the network itself."""
    index: Mapping[str, Any]
    """model_index.json; empty where `root` is the network itself."""
    class_name: str
    args: Mapping[str, Any]
    """The network's class, and the arguments to build it with."""

    @property
    def network(self) -> Path:
        return self.root / self.part if self.part else self.root

    @property
    def scheduler(self) -> dict[str, Any]:
        """The settings of the pipeline's sampler, empty if there are none."""
        file = self.root / "scheduler" / "scheduler_config.json"
        return _document(file) if file.is_file() else {}

    def libraries(self) -> set[tuple[str, str]]:
        """Library and class of the pipeline and each of its parts."""
        parts = {(entry[0], entry[1]) for entry in self.index.values() if isinstance(entry, list) and entry[0]}
        return parts | ({("diffusers", self.index["_class_name"])} if self.index else set())

    def num_elements(self, part: str) -> int:
        """Elements of the tensors in a part's files, of one variant if there are several."""
        counts: dict[str, int] = {}
        for file in sorted((self.root / part).glob("*.safetensors")):
            with opened_weights(file) as opened:
                count = sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())
            variant = re.sub(r"-\d+-of-\d+", "", file.name)
            counts[variant] = counts.get(variant, 0) + count
        return max(counts.values(), default=0)

    def has(self, part: str) -> bool:
        """Whether the pipeline has such a part: `vae`, `tokenizer`, ..."""
        return _holds(self.index, part)


def open_pretrained(where: str, subfolder: str | None = None, variant: str | None = None) -> PretrainedFolder:
    """The folder `where`, or the local copy of the hub's repository of that name (downloaded if it is not there).

    Raises:
        ConfigError: there is no such folder or repository, or it holds no network.
    """
    root = Path(where).expanduser()
    if not root.is_dir():
        root = _download(where, variant)
    index_file = root / "model_index.json"
    index = _document(index_file) if index_file.is_file() else {}
    part = subfolder or next((name for name in _NETWORKS if _holds(index, name)), None)
    settings_file = (root / part if part else root) / "config.json"
    if not settings_file.is_file():
        key, value = ("subfolder", subfolder) if subfolder else ("pretrained", where)
        raise ConfigError(
            f"model.{key}={value}: there is no {settings_file}; give a pipeline folder of diffusers"
            " (with model_index.json), or the folder of a network (with config.json)"
        )
    settings = _document(settings_file)
    args = {key: value for key, value in settings.items() if not key.startswith("_")}
    return PretrainedFolder(root=root, part=part, index=index, class_name=settings.get("_class_name", ""), args=args)


def _document(file: Path) -> dict[str, Any]:
    """What is in a JSON file. Raises ConfigError: it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no keys")
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {file} cannot be read ({error}); copy it anew") from error


@contextmanager
def opened_weights(file: Path) -> Iterator[Any]:
    """A safetensors file. Raises ConfigError: it is cut short, or is none."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); copy it anew") from error


def _holds(index: Mapping[str, Any], part: str) -> bool:
    return isinstance(index.get(part), list) and index[part][0] is not None


@functools.cache  # asked for again and again, also in the middle of a run, when the hub may be away
def _download(name: str, variant: str | None) -> Path:
    try:
        return Path(str(DiffusionPipeline.download(name, variant=variant)))
    except Exception as error:  # whatever the hub's client raises: no such name, no network, no access
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model.pretrained={name} is no folder, and cannot be had from the hub either ({reason});"
            " give the path of a folder in diffusers form, or the name of a repository that can be reached"
        ) from error


def weight_files(folder: PretrainedFolder, variant: str | None) -> dict[str, Path]:
    """The safetensors file that holds each tensor of the network, by tensor name.

    Raises:
        ConfigError: there are no such weights, or not as safetensors.
    """
    dotted = f".{variant}" if variant else ""
    index = folder.network / f"{_WEIGHTS}.safetensors.index{dotted}.json"
    single = folder.network / f"{_WEIGHTS}{dotted}.safetensors"
    if index.is_file():
        files = _document(index).get("weight_map", {})
        return {name: folder.network / file for name, file in files.items()}
    if single.is_file():
        with opened_weights(single) as opened:
            return dict.fromkeys(opened.keys(), single)
    found = sorted(file.name for file in folder.network.glob(f"{_WEIGHTS}*"))
    raise ConfigError(
        f"model.variant={variant or 'null'}: {folder.network} has no {single.name}"
        f" (it has {', '.join(found) or 'no weights'}); name a variant that is there, as safetensors"
    )


class FileWeights:
    """Rows of tensors in safetensors files: only what is asked for is read from the disk."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._opened: dict[Path, Any] = {}

    def names(self) -> set[str]:
        return set(self._files)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start : stop` of dimension 0, as they are in the file: (stop - start, ...)."""
        return self._file(name).get_slice(name)[start:stop]

    def whole(self, name: str) -> torch.Tensor:
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._opened:
            try:
                self._opened[path] = safe_open(path, "pt").__enter__()  # lives as long as this object
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"model.pretrained: {path} cannot be read ({error}); copy it anew") from error
        return self._opened[path]
