"""Parquet and Arrow files whose rows are samples: an encoded image, a text, a class."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.data.config import Columns
from trainers.data.files import Files, LocalFiles, SeekableFile
from trainers.data.images import Record, Records, digest, number_classes
from trainers.errors import BrokenSampleError, ConfigError

_KEPT_GROUPS = 4  # in memory; a random row needs all of its group


class TableRecords(Records):
    """Rows of all files in the order of their names.

    A row of a parquet file is read with its whole row group, so write small ones (100 rows or so). Arrow files are
    mapped into memory.
    """

    def __init__(self, files: Files, names: list[str], columns: Columns, captions: bool) -> None:
        opened = [_open(files, name) for name in names]
        self._names, self._tables = names, opened
        groups = [(file, group) for file, table in enumerate(opened) for group in range(len(table.group_rows))]
        self._groups = groups
        self._starts = np.cumsum([0, *(rows for table in opened for rows in table.group_rows)])
        if not len(self):
            raise ConfigError(f"data.path={files.root} has tables, but no row in them; give others")
        self._columns = found_columns(opened[0].names, columns, captions, f"{files.root}/{names[0]}")
        for name, table in zip(names, opened, strict=True):
            found_columns(table.names, columns, captions, f"{files.root}/{name}")
        self.has_captions = captions
        self.labels, self.num_classes = None, None
        if (key := self._columns.get("label")) is not None:
            labels = [label for table in opened for label in table.column(key)]
            self.labels, self.num_classes = number_classes(labels, f"data.path={files.root}, column {key}")
        counts = [f"{name} {files.size(name)} {table.group_rows}" for name, table in zip(names, opened, strict=True)]
        self.identity = digest("table", *counts, self._columns)
        self._kept: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()  # readers of parquet can not be shared

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        file, row = self._place(index)[0][0], index
        first = next(i for i, place in enumerate(self._groups) if place[0] == file)
        return f"{self._names[file]}, row {row - int(self._starts[first])}"

    def read(self, index: int) -> Record:
        place, row = self._place(index)
        table = self._group(place)
        image = image_bytes(table[self._columns["image"]][row].as_py(), self.name, index)
        caption = table[self._columns["caption"]][row].as_py() if self.has_captions else None
        return Record(image=image, caption=checked_caption(caption, self.name, index) if self.has_captions else None)

    def _place(self, index: int) -> tuple[tuple[int, int], int]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._groups[group], index - int(self._starts[group])

    def _group(self, place: tuple[int, int]) -> pa.Table:
        with self._lock:
            if place not in self._kept:
                wanted = [self._columns[part] for part in ("image", "caption") if part in self._columns]
                self._kept[place] = self._tables[place[0]].group(place[1], wanted)
                if len(self._kept) > _KEPT_GROUPS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(place)
            return self._kept[place]


def found_columns(names: list[str], columns: Columns, captions: bool, where: str) -> dict[str, str]:
    """image, caption and label -> the column that has it; label only if there is one.

    Raises:
        ConfigError: the image or caption has none, or a column that was named is missing.
    """
    wanted = {"image": columns.image or "image", "label": columns.label or "label"}
    if captions:
        usual = next((name for name in ("text", "caption") if name in names), "text")
        wanted["caption"] = columns.caption or usual
    for part, name in wanted.items():
        if name not in names and (part != "label" or columns.label is not None):
            raise ConfigError(f"{where} has no column {name}, but {', '.join(names)}; set data.columns.{part}")
    return {part: name for part, name in wanted.items() if name in names}


def image_bytes(value: Any, name: Any, index: int) -> bytes:
    """The encoded image of a cell: bytes, or what Hugging Face writes: {"bytes": ..., "path": ...}."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes):
        raise BrokenSampleError(
            f"data.path: {name(index)} holds no encoded image; give its bytes, or set data.on_broken=skip"
        )
    return data


def checked_caption(value: Any, name: Any, index: int) -> str:
    """The text of a cell."""
    if not isinstance(value, str):
        raise BrokenSampleError(f"data.path: {name(index)} has no text; give one, or set data.on_broken=skip")
    return value


class _ParquetTable:
    def __init__(self, files: Files, name: str) -> None:
        self._file = pq.ParquetFile(io.BufferedReader(SeekableFile(files, name), 1 << 20))
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.names: list[str] = self._file.schema_arrow.names

    def group(self, index: int, columns: list[str]) -> pa.Table:
        return self._file.read_row_group(index, columns=columns, use_threads=False)

    def column(self, name: str) -> list[Any]:
        return self._file.read(columns=[name], use_threads=False)[name].to_pylist()


class _ArrowTable:
    def __init__(self, files: Files, name: str) -> None:
        if not isinstance(files, LocalFiles):
            raise ConfigError(
                f"{files.root}/{name} is mapped into memory, so it must be local; copy it, or give parquet"
            )
        mapped = pa.memory_map(files.path(name))
        try:
            self._table = pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:  # the format without an index at its end, which Hugging Face writes
            mapped.seek(0)
            self._table = pa.ipc.open_stream(mapped).read_all()
        self.group_rows = [self._table.num_rows]
        self.names: list[str] = self._table.column_names

    def group(self, index: int, columns: list[str]) -> pa.Table:
        return self._table.select(columns)

    def column(self, name: str) -> list[Any]:
        return self._table[name].to_pylist()


def _open(files: Files, name: str) -> _ParquetTable | _ArrowTable:
    try:
        return (_ParquetTable if name.lower().endswith(".parquet") else _ArrowTable)(files, name)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(f"data.path: {files.root}/{name} is no whole table ({reason}); write it again") from error
