"""TensorBoard event files; each step is shown once, however often the writer was killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorboardX

from orchestrator.messages.attempts import Event
from orchestrator.tracking.media import load_image
from orchestrator.tracking.rows import Rows

_FLUSH_S = 2.0


class TensorBoardSink:
    """Writes below one folder, in a file of its own for each life of the process."""

    def __init__(self, opened: Event, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._say = say
        self._mark = folder / "flushed.txt"
        self._step = int(self._mark.read_text(encoding="utf-8")) if self._mark.exists() else 0
        # Readers drop what an earlier file has from this step on: it may have been written and not marked.
        self._writer = tensorboardX.SummaryWriter(
            str(folder),
            purge_step=self._step + 1,
            max_queue=1000,
            filename_suffix=f".{time.time_ns()}",  # two files of one second would be one
        )
        self._rows = Rows(opened.fields["config"]["train"]["global_batch_size"])
        self._known = self._step
        self._flushed_s = time.monotonic()

    def take(self, event: Event) -> None:
        """Raises OSError if a file cannot be written."""
        row = self._rows.take(event)
        if row is not None and row.step > self._step:
            for name, value in row.values.items():
                self._writer.add_scalar(name, value, row.step, walltime=row.time_s)
            self._step = row.step
        if event.kind in ("validation", "samples") and event.fields["step"] > self._known:
            self._add_evaluation(event)
        if time.monotonic() - self._flushed_s >= _FLUSH_S:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _add_evaluation(self, event: Event) -> None:
        step = event.fields["step"]
        if event.kind == "validation":
            for name, value in event.fields["metrics"].items():
                self._writer.add_scalar(f"validation/{name}", value, step, walltime=event.time_s)
        elif (image := load_image(event.fields["path"], self._say)) is not None:
            title = f"samples/{event.fields['title']}"
            self._writer.add_image(title, np.asarray(image), step, walltime=event.time_s, dataformats="HWC")

    def _flush(self) -> None:
        self._writer.flush()
        part = self._mark.with_suffix(".part")
        part.write_text(str(self._step), encoding="utf-8")
        os.replace(part, self._mark)
        self._flushed_s = time.monotonic()
