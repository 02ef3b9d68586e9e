"""WebDataset shards, read by index: where each member lies is found out once, by a pass over the headers of a tar."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping

import numpy as np
import xxhash

from trainers.data.config import Columns
from trainers.data.files import Files, SeekableFile
from trainers.data.images import Record, Records, digest, image_suffixes, number_classes
from trainers.data.index_cache import cached
from trainers.errors import BrokenSampleError, ConfigError

_EDGE = 64 << 10  # bytes at both ends of a tar that tell it from another one

_Place = tuple[int, int]  # offset and size in bytes
_NOWHERE = (-1, -1)


class TarRecords(Records):
    """The samples of all shards, in the order of their names and of their members.

    Members of one sample have the same path up to the first dot of the file name: 0001.jpg, 0001.txt, 0001.cls.
    """

    def __init__(self, files: Files, shards: list[str], columns: Columns, captions: bool, cache: str | None) -> None:
        self._files, self._shards = files, shards
        self._image, self._caption, self._label = columns.image, columns.caption or "txt", columns.label or "cls"
        marks = [_mark(files, shard) for shard in shards]
        suffixes: set[str] = set()
        keys, places = [], []
        for number, (shard, mark) in enumerate(zip(shards, marks, strict=True)):
            index = cached(cache, f"tar-{mark}", lambda shard=shard: _index(files, shard))
            for key, members in _samples(index, f"{files.root}/{shard}").items():
                suffixes |= members.keys()
                if (image := self._image_suffix(members)) is not None:
                    keys.append(key.encode(errors="surrogatepass"))  # it may be any bytes
                    parts = (members.get(where.partition(".")[0], _NOWHERE) for where in (self._caption, self._label))
                    places.append((number, *members[image], *(value for part in parts for value in part)))
        if not places:
            wanted = f"suffix {columns.image}" if columns.image else "suffix of an image"
            raise ConfigError(
                f"data.path={files.root}: no member of its shards has the {wanted}; set data.columns.image"
            )
        self._keys = np.array(keys)  # without a dictionary for each sample: there may be many millions
        self._places = np.array(places, dtype=np.int64)  # shard; offset and size of image, caption and label
        self.has_captions = captions
        if captions and (self._places[:, 3] < 0).all():
            raise ConfigError(
                f"data.captions=true, but no sample has a member .{self._caption.partition('.')[0]}, only"
                f" {', '.join(sorted(suffixes))}; set data.columns.caption, such as json.caption"
            )
        self.labels, self.num_classes = self._read_labels(wanted=columns.label is not None)
        self.identity = digest("webdataset", *marks, columns, captions)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]]}, sample {self._keys[index].decode(errors='replace')}"

    def read(self, index: int) -> Record:
        caption = self._text(index, 3, self._caption) if self.has_captions else None
        return Record(image=self._bytes(index, 1), caption=caption)

    def _image_suffix(self, members: Mapping[str, _Place]) -> str | None:
        if self._image is not None:
            return self._image if self._image in members else None
        return next((suffix for suffix in members if f".{suffix}" in image_suffixes()), None)

    def _bytes(self, index: int, column: int) -> bytes:
        shard, offset, size = (int(value) for value in self._places[index, [0, column, column + 1]])
        data = self._files.read(self._shards[shard], offset, offset + size)
        if len(data) != size:
            raise BrokenSampleError(f"data.path: {self._shards[shard]} is cut short; copy the shard again")
        return data

    def _text(self, index: int, column: int, where: str) -> str:
        """What a member says, or its value of KEY for json.KEY."""
        suffix, _, key = where.partition(".")
        try:
            if self._places[index, column] < 0:
                raise ValueError(f"no member .{suffix}")
            text = self._bytes(index, column).decode()
            if not key:
                return text
            value = json.loads(text)[key]
            if not isinstance(value, str | int):  # of null it would make the text "None"
                raise TypeError(f"it is {json.dumps(value)[:40]}")
            return str(value)
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenSampleError(
                f"data.path: {self.name(index)} has no text {where} ({error}); add it, or set data.on_broken=skip"
            ) from error

    def _read_labels(self, wanted: bool) -> tuple[np.ndarray | None, int | None]:
        if not wanted and (self._places[:, 5] < 0).any():
            return None, None
        texts = [self._text(index, 5, self._label).strip() for index in range(len(self))]
        labels: list[object] = [int(text) if text.isdecimal() else text for text in texts]
        return number_classes(labels, f"data.path={self._files.root}, .{self._label}")


def _mark(files: Files, shard: str) -> str:
    """A hash of a shard's name, size and both ends."""
    size = files.size(shard)
    found = xxhash.xxh3_128(f"{shard} {size}\n".encode())
    found.update(files.read(shard, 0, min(_EDGE, size)))
    found.update(files.read(shard, max(0, size - _EDGE), size))
    return found.hexdigest()


def _index(files: Files, shard: str) -> np.ndarray:
    """(N,) records of name, offset and size: every file in the tar."""
    try:
        with tarfile.open(
            fileobj=io.BufferedReader(SeekableFile(files, shard), _EDGE), mode="r:", encoding="utf-8"
        ) as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(
            f"data.path: {files.root}/{shard} is no whole, uncompressed tar ({error}); write it again"
        ) from error
    if not found:
        raise ConfigError(f"data.path: {files.root}/{shard} holds no files; remove it")
    width = max(len(name) for name, *_ in found)
    return np.array(found, dtype=[("name", f"U{width}"), ("offset", np.int64), ("size", np.int64)])


def _samples(index: np.ndarray, where: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Key of a sample -> suffix -> offset and size, in the order of the tar.

    Raises:
        ConfigError: two members would be the same part of the same sample.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in index.tolist():
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        if dot and stem:
            members = samples.setdefault(f"{folder}{slash}{stem}", {})
            if members.setdefault(suffix.lower(), (offset, size)) != (offset, size):
                raise ConfigError(f"data.path: {where} holds {name!r} twice; give every sample a name of its own")
    return samples
