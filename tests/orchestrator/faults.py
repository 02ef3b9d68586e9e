"""Imported by the tests' fork server: data that is faulty at samples which a file names, read by every new trainer; and
bits that turn over in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import trainers.build
import trainers.loop
from trainers.data.config import DataConfig
from trainers.data.files import FilesAt
from trainers.data.samples import Samples, Source
from trainers.data.sources import open_source
from trainers.state import TrainState
from trainers.step import Task, train_step

FILE = "UNBROKEN_TEST_FAULTS"
"""Environment variable with the path of a JSON file: {"nan": [index, ...], "raise": [...], "signal": {index: number},
"drift": {index: path}, "flip": [[rank, step, bit, path], ...]}; a sample drifts while the file at path exists, a bit of
the weights turns over after a step unless it does."""


class FaultySource(Source):
    def __init__(self, source: Source, faults: dict[str, Any]) -> None:
        self._source = source
        self._faults = faults
        self.channels, self.num_classes = source.channels, source.num_classes
        self.has_captions = source.has_captions

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        samples = self._source.read(indices, crops)
        for image, index in zip(samples.images, indices.tolist(), strict=True):
            if index in self._faults.get("raise", ()):
                raise ValueError(f"sample {index} is broken")
            if number := self._faults.get("signal", {}).get(str(index)):
                os.kill(os.getpid(), number)
            if index in self._faults.get("nan", ()):
                image.fill_(float("nan"))
            flag = self._faults.get("drift", {}).get(str(index))
            if flag and Path(flag).exists():
                image.add_(0.01)
        return samples


def _faults() -> dict[str, Any]:
    faults = Path(os.environ[FILE])
    return json.loads(faults.read_text()) if faults.exists() else {}


def _open(config: DataConfig, files_at: FilesAt) -> Source:
    source, faults = open_source(config, files_at), _faults()
    return FaultySource(source, faults) if faults.keys() - {"flip"} else source


def _train_step(state: TrainState, task: Task) -> dict[str, float]:
    metrics = train_step(state, task)
    for rank, step, bit, flag in _faults().get("flip", ()):
        if (rank, step) == (state.topology.rank, state.progress.step) and not Path(flag).exists():
            Path(flag).touch()
            words = state.parameters[0].local.numpy().reshape(-1).view(np.uint32)
            words[0] ^= np.uint32(1 << bit)
    return metrics


trainers.loop.train_step = _train_step


trainers.build.open_source = _open
