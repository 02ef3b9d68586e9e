"""Latents and text embeddings that were made before the run: what `unbroken data prepare` writes, or a user's own.

Each file is safetensors or npz, with row i of every tensor in it for one sample:
    mean, deviation    (N, c, h, w) what the VAE finds likely, before shift and scale; a step draws from it; or
    latents            (N, c, h, w) as they are denoised
    sizes              (N, 6) as in `Samples`; without it, the image whole
    labels             (N,) class numbers
    tokens, pooled, mask    (N, T, D), (N, P), (N, T): captions as text encoders see them
`index.json` beside them, if there is one, names the files, says which encoders made them, and is written last.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from trainers.data.files import Files, SeekableFile
from trainers.data.images import digest, number_classes
from trainers.data.samples import LatentFacts, Samples, Source, Text
from trainers.errors import ConfigError

INDEX = "index.json"
PREPARING = "preparing.json"
EMPTY = "empty.safetensors"
FORMAT = "unbroken-latents-1"
_KEPT_FILES = 2  # whole files of npz in memory; of safetensors, rows are read alone
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
    "I8": "|i1",
    "BOOL": "|b1",
}


class LatentSource(Source):
    """Rows of all files, in the order of their names."""

    def __init__(self, files: Files, names: list[str], whole_folder: bool) -> None:
        """Args: whole_folder: `names` are all of it, so that what lies beside them says more of them."""
        self._where = f"data.path={files.root}"
        index = _read_index(files) if whole_folder else {}
        names = index.get("shards") or [name for name in names if name != EMPTY]
        if not names:
            raise ConfigError(f"{self._where} holds {EMPTY} and no latents; give the folder of the latents")
        self._names = names
        self._files = [_open(files, name) for name in names]
        self._check_parts()
        rows = [file.shapes[self._mean][0] for file in self._files]
        self._starts = np.cumsum([0, *rows])
        if not len(self):
            raise ConfigError(f"{self._where} has files of latents, but no row in them; give others")
        shape = self._files[0].shapes[self._mean][1:]
        self.channels, self.has_captions = shape[0], False
        self.num_classes = index.get("num_classes")
        if "labels" in self._parts and self.num_classes is None:
            every = (file.rows("labels", np.arange(count)) for file, count in zip(self._files, rows, strict=True))
            labels = np.concatenate([part.astype(np.int64) for part in every])  # as they are read
            _, self.num_classes = number_classes(labels.tolist(), f"{self._where}, labels")
        text = bool(self._parts & {"tokens", "pooled"})
        self.latents = LatentFacts(
            shape=(shape[0], shape[1], shape[2]),
            shift=index.get("shift"),
            scale=index.get("scale"),
            image_size=index.get("image_size"),
            encoders=index.get("encoders", {}),
            empty=_text(_Safetensors(files, EMPTY), np.zeros(1, dtype=np.int64))
            if text and files.exists(EMPTY)
            else None,
            has_text=text,
            has_sizes="sizes" in self._parts,
        )
        if "mean" in self._parts and self.latents.scale is None:
            raise ConfigError(f"{self._where} has mean and deviation, but no {INDEX} with shift and scale; add it")
        sizes = [f"{name} {files.size(name)}" for name in names]
        self.identity = index.get("identity") or digest("latents", *sizes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        """As `Source.read`; nothing is cut any more."""
        found: dict[str, np.ndarray] = {}
        which = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(which).tolist():
            here = which == number
            for part in self._parts:
                rows = self._files[number].rows(part, indices[here] - self._starts[number])
                found.setdefault(part, np.empty((len(indices), *rows.shape[1:]), rows.dtype))[here] = rows
        tensors = {part: torch.from_numpy(rows) for part, rows in found.items()}
        height, width = tensors[self._mean].shape[2:]
        whole = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        text = {part: tensors[part].float() for part in ("tokens", "pooled") if part in tensors}
        if "mask" in tensors:
            text["mask"] = tensors["mask"].long()
        return Samples(
            images=tensors[self._mean].float(),
            deviations=tensors["deviation"].float() if "deviation" in tensors else None,
            labels=tensors["labels"].long() if "labels" in tensors else None,
            sizes=tensors["sizes"].float() if "sizes" in tensors else whole.expand(len(indices), 6).clone(),
            text=Text(**text) if text else None,
        )

    def _check_parts(self) -> None:
        """Set the parts that samples have, the same in all files."""
        first = self._files[0].shapes
        known = {"latents", "mean", "deviation", "sizes", "labels", "tokens", "pooled", "mask"}
        self._parts = first.keys() & known
        self._mean = "mean" if "mean" in first else "latents"
        needed = {"mean", "deviation"} if "mean" in first else {"latents"}
        if missing := needed - self._parts:
            raise ConfigError(
                f"{self._where}/{self._names[0]} has no {', '.join(sorted(missing))}, but {', '.join(sorted(first))};"
                " see trainers/data/latents.py"
            )
        for name, file in zip(self._names, self._files, strict=True):
            rows = {part: shape[0] for part, shape in file.shapes.items() if part in self._parts}
            others = {part: shape[1:] for part, shape in file.shapes.items() if part in self._parts}
            if others != {part: first[part][1:] for part in self._parts} or len(set(rows.values())) > 1:
                raise ConfigError(
                    f"{self._where}/{name} has other tensors than {self._names[0]}, or not as many rows of each:"
                    f" {file.shapes}; make it again"
                )
            if len(file.shapes[self._mean]) != 4:
                raise ConfigError(f"{self._where}/{name}: {self._mean} is {file.shapes[self._mean]}, not (N, c, h, w)")


def _open(files: Files, name: str) -> _Safetensors | _Npz:
    try:
        return (_Safetensors if name.endswith(".safetensors") else _Npz)(files, name)
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.path={files.root}: {name}, which {INDEX} names, is not there; run `unbroken data prepare` again"
        ) from error


def _text(file: _Safetensors, rows: np.ndarray) -> Text:
    parts = {part: torch.from_numpy(file.rows(part, rows)) for part in file.shapes}
    return Text(**{part: value.long() if part == "mask" else value.float() for part, value in parts.items()})


def _read_index(files: Files) -> Mapping[str, Any]:
    if not files.exists(INDEX):
        if files.exists(PREPARING):
            raise ConfigError(f"data.path={files.root} is not complete; run `unbroken data prepare` again, it goes on")
        return {}
    try:
        index = json.loads(files.read(INDEX))
    except ValueError as error:
        raise ConfigError(f"data.path={files.root}/{INDEX} is damaged ({error}); make it again") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise ConfigError(f"data.path={files.root}/{INDEX}: format {found!r} is not {FORMAT}; make it again")
    return index


class _Safetensors:
    """Rows are read alone: the header says where each lies."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        try:
            length = int.from_bytes(files.read(name, 0, 8), "little")
            if not 2 <= length <= files.size(name) - 8:
                raise ValueError("cut short")
            header = json.loads(files.read(name, 8, 8 + length))
            self._tensors = {part: entry for part, entry in header.items() if part != "__metadata__"}
            self.shapes = {part: tuple(entry["shape"]) for part, entry in self._tensors.items()}
            dtypes = {entry["dtype"] for entry in self._tensors.values()}
            end = max((entry["data_offsets"][1] for entry in self._tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{files.root}/{name} is no whole safetensors file ({error}); make it again") from error
        self._first = 8 + length
        if unknown := dtypes - _DTYPES.keys():
            raise ConfigError(
                f"{files.root}/{name} has tensors of {', '.join(unknown)}; make them {', '.join(_DTYPES)}"
            )
        if files.size(name) != self._first + end:
            raise ConfigError(f"{files.root}/{name} is cut short; make it again")

    def rows(self, part: str, rows: np.ndarray) -> np.ndarray:
        entry = self._tensors[part]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape = self.shapes[part][1:]
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        begin = self._first + entry["data_offsets"][0]
        read = [self._files.read(self._name, begin + row * size, begin + (row + 1) * size) for row in rows.tolist()]
        values = np.frombuffer(bytearray().join(read), dtype).reshape(len(rows), *shape)
        if entry["dtype"] == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


class _Npz:
    """Whole arrays: numpy compresses them, so they are read at once and kept while they are of use."""

    _kept: ClassVar[OrderedDict[tuple[str, str], dict[str, np.ndarray]]] = OrderedDict()
    _lock = threading.Lock()

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        self.shapes = {part: array.shape for part, array in self._arrays().items()}

    def _arrays(self) -> dict[str, np.ndarray]:
        key = (self._files.root, self._name)
        with self._lock:
            if key not in self._kept:
                try:
                    with np.load(
                        io.BufferedReader(SeekableFile(self._files, self._name)), allow_pickle=False
                    ) as arrays:
                        self._kept[key] = dict(arrays)
                except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                    raise ConfigError(f"{'/'.join(key)} is no npz file ({error}); make it again") from error
                if len(self._kept) > _KEPT_FILES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def rows(self, part: str, rows: np.ndarray) -> np.ndarray:
        return self._arrays()[part][rows]
