"""A folder of image files, with classes as sub-folders, or texts and classes in metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainers.data.files import Files
from trainers.data.images import Record, digest, number_classes
from trainers.errors import ConfigError

METADATA = "metadata.jsonl"


class FolderRecords:
    """Image files, sorted by path.

    Sub-folders are classes, numbered in sorted order; without any, the images have no labels. Lines {"file_name": ...,
    "text": ..., "label": ...} of metadata.jsonl give captions, and labels in place of those of the folders; file names
    are relative to the folder.
    """

    def __init__(self, files: Files, names: list[str], captions: bool) -> None:
        classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        if classes:  # what lies beside the folders of classes belongs to none
            names = [name for name in names if "/" in name]
        self._files, self._names = files, names
        self.has_captions = captions
        self.num_classes: int | None = len(classes) or None
        self.labels = np.array([classes.index(name.partition("/")[0]) for name in names]) if classes else None
        entries = _read_metadata(files, names, required=captions)
        self._captions = _texts(files, names, entries) if captions else None
        if any("label" in entry for entry in entries.values()):
            labels: list[object] = [entries.get(name, {}).get("label") for name in names]
            self.labels, self.num_classes = number_classes(labels, f"{files.root}/{METADATA}")
        self.identity = digest("folder", *names, *(self._captions or ()), *(() if self.labels is None else self.labels))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._files.root}/{self._names[index]}"

    def read(self, index: int) -> Record:
        return Record(
            image=self._files.read(self._names[index]),
            caption=None if self._captions is None else self._captions[index],
        )


def _read_metadata(files: Files, names: list[str], required: bool) -> Mapping[str, Mapping[str, Any]]:
    """File name -> its line; empty without such a file."""
    where = f"{files.root}/{METADATA}"
    if not files.exists(METADATA):
        if required:
            raise ConfigError(
                f"data.captions=true needs {where}; write a line for every image:"
                ' {"file_name": "a.png", "text": "a red square"}'
            )
        return {}
    entries = {}
    for number, line in enumerate(files.read(METADATA).decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries[entry["file_name"]] = entry
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{where}, line {number}: {error!r}; give file_name and text as JSON") from None
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
