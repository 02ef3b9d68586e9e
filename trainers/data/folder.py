"""A folder of image files, with classes as sub-folders, and texts in metadata.jsonl or beside the images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from trainers.data.files import Files, LocalFiles
from trainers.data.images import Record, Records, digest, number_classes
from trainers.errors import ConfigError

METADATA = "metadata.jsonl"
_READERS = 16  # threads that read texts, which mostly wait for storage


class FolderRecords(Records):
    """Image files, sorted by path.

    Sub-folders are classes, numbered in sorted order; without any, the images have no labels. Lines {"file_name": ...,
    "text": ..., "label": ...} of metadata.jsonl give captions, and labels in place of those of the folders; file names
    are relative to the folder. Without that file, a.txt is the caption of a.png.
    """

    def __init__(self, files: Files, names: list[str], captions: bool) -> None:
        classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        if classes:  # what lies beside the folders of classes belongs to none
            names = [name for name in names if "/" in name]
        self._files, self._names = files, names
        self.has_captions = captions
        self.num_classes: int | None = len(classes) or None
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([numbers[name.partition("/")[0]] for name in names]) if classes else None
        entries = _read_metadata(files, captions) or (_read_texts(files, names) if captions else {})
        self._captions = _texts(files, names, entries) if captions else None
        if any("label" in entry for entry in entries.values()):
            labels: list[object] = [entries.get(name, {}).get("label") for name in names]
            self.labels, self.num_classes = number_classes(labels, f"{files.root}/{METADATA}")
        self.identity = digest("folder", *names, *(self._captions or ()), *(() if self.labels is None else self.labels))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._files.root}/{self._names[index]}"

    def version(self) -> str:
        if not isinstance(self._files, LocalFiles):  # there each answer takes a trip to the storage
            return digest(self.identity, self._files.root)
        stats = (os.stat(self._files.path(name)) for name in self._names)
        return digest(self.identity, *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats))

    def read(self, index: int) -> Record:
        return Record(
            image=self._files.read(self._names[index]),
            caption=None if self._captions is None else self._captions[index],
        )


def _read_texts(files: Files, names: list[str]) -> Mapping[str, Mapping[str, Any]]:
    """File name -> the text in the file beside it, in the form of a line of metadata.jsonl."""
    there = set(files.names((".txt",)))
    beside = {name: f"{os.path.splitext(name)[0]}.txt" for name in names}
    missing = [name for name in names if beside[name] not in there]
    if missing:
        raise ConfigError(
            f"data.captions=true needs a text for every image, in {files.root}/{METADATA} or beside it, and"
            f" {len(missing)} have none, such as {missing[0]}; write {beside[missing[0]]}, or for all of them lines"
            ' {"file_name": "a.png", "text": "a red square"}'
        )

    def text(name: str) -> str:
        try:
            return files.read(beside[name]).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{files.root}/{beside[name]} is not UTF-8 ({error}); write it again") from None

    with ThreadPoolExecutor(_READERS) as pool:
        return {name: {"text": found} for name, found in zip(names, pool.map(text, names), strict=True)}


def _read_metadata(files: Files, required: bool) -> Mapping[str, Mapping[str, Any]]:
    """File name -> its line; empty without such a file."""
    where = f"{files.root}/{METADATA}"
    if not files.exists(METADATA):
        return {}
    try:
        text = files.read(METADATA).decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 ({error}); write it again") from None
    entries = {}
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also cuts where a text may go on: U+2028
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            repeated = entry["file_name"] in entries
            entries[entry["file_name"]] = entry
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{where}, line {number}: {error!r}; give file_name and text as JSON") from None
        if repeated:
            raise ConfigError(f"{where}, line {number}: {entry['file_name']} has a line already; leave one of them")
        if not isinstance(entry["file_name"], str):
            raise ConfigError(f"{where}, line {number}: file_name must be a text; correct the line")
        if required and not isinstance(entry.get("text"), str):
            raise ConfigError(f"{where}, line {number}: it has no text of that image; add text, or correct the line")
    return entries


def _texts(files: Files, names: list[str], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    missing = [name for name in names if name not in entries]
    if missing:
        where = f"{files.root}/{METADATA}"
        raise ConfigError(f"{where} has no line for {len(missing)} images, such as {missing[0]}; add them")
    return [entries[name]["text"] for name in names]
