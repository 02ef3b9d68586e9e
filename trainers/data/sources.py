"""From a config to the source of its samples."""

from __future__ import annotations

import numpy as np
import torch

from trainers.data.config import DataConfig
from trainers.data.files import Files, FilesAt, local_files, split_file
from trainers.data.folder import FolderRecords
from trainers.data.images import ImageSource, Records, image_suffixes
from trainers.data.latents import LatentSource
from trainers.data.samples import Samples, Source
from trainers.data.tar_shards import TarRecords
from trainers.errors import ConfigError

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SUFFIXES = {
    "table": (".parquet", ".arrow", ".feather"),
    "webdataset": (".tar",),
    "latents": (".safetensors", ".npz"),
}


def open_source(config: DataConfig, files_at: FilesAt = local_files) -> Source:
    """The source that `config` names.

    Args:
        files_at: opens `data.path`; the default reads local paths only.

    Raises:
        ConfigError: it is not there, has no samples, or not the parts that the config asks for.
    """
    if config.source == "digits":
        return DigitsSource(config.image_size, config.captions)
    assert config.path is not None
    if config.source == "datasets":
        from trainers.data.hugging_face import HuggingFaceRecords  # a second of imports

        return ImageSource(HuggingFaceRecords(config.path, config.split, config.columns, config.captions), config)
    suffixes = _SUFFIXES.get(config.source, ())
    folder, only = split_file(config.path, suffixes)
    files = files_at(folder)
    if not files.exists(only):
        kinds = "" if only else " as a folder" + f" or a file of {', '.join(suffixes)}" * bool(suffixes)
        raise ConfigError(f"data.path={config.path} is not there{kinds}; give the folder, file or URL of the data")
    names = [only] if only else files.names(suffixes or image_suffixes())
    if not names:
        what = "images" if config.source == "folder" else config.source
        raise ConfigError(f"data.path={config.path} holds no {what} ({', '.join(suffixes or image_suffixes())})")
    if config.source == "latents":
        if config.captions:
            raise ConfigError(
                "data.captions=true has no effect on latents, whose captions are encoded; set it to false"
            )
        return LatentSource(files, names, whole_folder=only is None)
    return ImageSource(_open_records(config, files, names), config)


def _open_records(config: DataConfig, files: Files, names: list[str]) -> Records:
    if config.source == "folder":
        return FolderRecords(files, names, config.captions)
    if config.source == "table":
        from trainers.data.tables import TableRecords  # half a second of imports

        return TableRecords(files, names, config.columns, config.captions)
    return TarRecords(files, names, config.columns, config.captions, config.cache)


class DigitsSource(Source):
    """1,797 handwritten digits, 8 x 8 grey, in memory; they come with scikit-learn, nothing is downloaded."""

    channels = 1
    num_classes: int | None = 10
    identity = "digits"

    def __init__(self, image_size: int, captions: bool = False) -> None:
        try:
            # An optional package, and 2 s of imports that only this source needs.
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ConfigError("data.source=digits needs scikit-learn; run: pip install scikit-learn") from error
        pixels, labels = load_digits(return_X_y=True)  # (1797, 64) in 0 .. 16
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        if image_size != 8:
            images = torch.nn.functional.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
        self._images = images  # (1797, 1, H, W)
        self._labels = torch.from_numpy(labels).long()
        self.has_captions = captions
        self._size = (8, 8, 0, 0, image_size, image_size)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        at = torch.from_numpy(indices)
        labels = self._labels[at]
        captions = tuple(f"a handwritten {_DIGITS[label]}" for label in labels.tolist())
        return Samples(
            images=self._images[at],
            labels=labels,
            captions=captions if self.has_captions else None,
            sizes=torch.tensor([self._size] * len(indices), dtype=torch.float32),
        )
