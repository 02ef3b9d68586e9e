"""What is found out by reading through data once, kept on the local disk. It may be removed at any time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np


def cached(folder: str | None, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of that name, made by `make` if it is not there yet. Several processes may ask at once.

    Args:
        folder: `data.cache`; None: ~/.cache/unbroken.
        name: says what it is an array of, in full: content, not place.
    """
    place = Path(folder).expanduser() if folder else Path.home() / ".cache" / "unbroken"
    path = place / f"{name}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there, or cut short: made anew
        return np.load(path, allow_pickle=False)
    array = make()
    with suppress(OSError):  # a disk that is full or read-only costs time at the next start, nothing else
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".") as folder:  # a disk that is full keeps no half of it
            np.save(Path(folder, path.name), array)
            os.replace(Path(folder, path.name), path)  # complete or not at all: others may be reading
    return array
