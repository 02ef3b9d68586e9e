from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.data.index_cache import cached


def test_what_was_found_out_is_kept(tmp_path: Path) -> None:
    made = [cached(str(tmp_path), "sizes", lambda: np.arange(3)) for _ in range(2)]
    kept = cached(str(tmp_path), "sizes", lambda: pytest.fail("it is there"))
    assert all(np.array_equal(array, np.arange(3)) for array in (*made, kept))
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.npy"]


def test_a_full_disk_keeps_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(file: Any, array: np.ndarray) -> None:
        Path(file.name if hasattr(file, "write") else file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    assert np.array_equal(cached(str(tmp_path), "sizes", lambda: np.arange(3)), np.arange(3))
    assert list(tmp_path.iterdir()) == []
