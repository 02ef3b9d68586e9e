"""Data sets of Hugging Face, saved on a disk or of its hub: the door to the package `datasets`."""

from __future__ import annotations

import os
from typing import Any

from trainers.data.config import Columns
from trainers.data.images import Record, Records, digest, number_classes
from trainers.data.tables import checked_caption, found_columns, image_bytes
from trainers.errors import ConfigError


class HuggingFaceRecords(Records):
    """The rows of one data set. What `save_to_disk` wrote is mapped into memory."""

    def __init__(self, path: str, split: str | None, columns: Columns, captions: bool) -> None:
        rows = _load(path, split)
        where = f"data.path={path}"
        self._columns = found_columns(rows.column_names, columns, captions, where)
        self.has_captions = captions
        if not len(rows):
            raise ConfigError(f"{where} has no rows; give another data set or data.split")
        self.labels, self.num_classes = None, None
        if (key := self._columns.get("label")) is not None:
            self.labels, count = number_classes(rows[key][:], f"{where}, column {key}")
            named = getattr(rows.features[key], "num_classes", None)  # also of classes without a sample
            self.num_classes = named or count
        size = rows.data.nbytes
        self.identity = digest("datasets", len(rows), size, rows.column_names, self._columns)
        self._path = path
        self._rows = _undecoded(rows, self._columns["image"])

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self._path}, row {index}"

    def read(self, index: int) -> Record:
        row = self._rows[index]
        image = image_bytes(row[self._columns["image"]], self.name, index)
        caption = checked_caption(row[self._columns["caption"]], self.name, index) if self.has_captions else None
        return Record(image=image, caption=caption)


def _load(path: str, split: str | None) -> Any:
    try:
        import datasets  # an optional package
    except ImportError as error:
        raise ConfigError("data.source=datasets needs a package; run: pip install unbroken[datasets]") from error
    datasets.disable_progress_bars()
    try:
        saved = os.path.isdir(path) or "://" in path
        found: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # it raises what it likes: errors of its own, of pyarrow, of file systems
        reason = str(error).splitlines()[0]
        raise ConfigError(f"data.path={path} can not be opened as a data set: {reason}; see save_to_disk") from error
    if isinstance(found, dict):
        if split is None and len(found) == 1:
            return next(iter(found.values()))
        if split not in found:
            raise ConfigError(f"data.split={split}, but {path} has {', '.join(found)}; set data.split to one of them")
        return found[split]
    if split is not None:
        raise ConfigError(f"data.split={split}, but {path} is one data set without splits; remove data.split")
    return found


def _undecoded(rows: Any, column: str) -> Any:
    import datasets

    if isinstance(rows.features[column], datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows
