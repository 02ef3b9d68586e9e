"""Small data in every form, made of the same images: a gradient of its own colour for each index."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((12, 8), (8, 12), (10, 10), (8, 16), (9, 7), (16, 8))
"""(height, width), index by index, and again from the beginning."""


def image(index: int) -> Image.Image:
    height, width = SIZES[index % len(SIZES)]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 20 * index % 256
    pixels[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 2] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def encoded(index: int) -> bytes:
    file = io.BytesIO()
    image(index).save(file, "PNG")
    return file.getvalue()


def caption(index: int) -> str:
    return f"picture {index}"


def write_folder(root: Path, count: int, **metadata: Any) -> Path:
    """metadata: more keys of each line, as functions of the index."""
    root.mkdir(parents=True)
    lines = []
    for index in range(count):
        (root / f"{index:02d}.png").write_bytes(encoded(index))
        more = {key: make(index) for key, make in metadata.items()}
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": caption(index), **more}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def rows(count: int) -> dict[str, list[Any]]:
    return {
        "image": [encoded(index) for index in range(count)],
        "text": [caption(index) for index in range(count)],
        "label": [index % 3 for index in range(count)],
    }


def write_parquet(root: Path, count: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    table = pa.table(rows(count))
    half = count // 2
    pq.write_table(table.slice(0, half), root / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(half), root / "b.parquet", row_group_size=3)
    return root


def write_arrow(root: Path, count: int) -> Path:
    import pyarrow as pa

    root.mkdir(parents=True)
    table = pa.table(rows(count))
    with pa.ipc.new_file(root / "a.arrow", table.schema) as file:
        file.write_table(table.slice(0, 2))
    with pa.ipc.new_stream(root / "b.arrow", table.schema) as file:
        file.write_table(table.slice(2))
    return root


def write_tars(root: Path, count: int) -> Path:
    root.mkdir(parents=True)
    half = count // 2
    for name, indices in (("a.tar", range(half)), ("b.tar", range(half, count))):
        with tarfile.open(root / name, "w") as tar:
            for index in indices:
                add(tar, f"{index:02d}.png", encoded(index))
                add(tar, f"{index:02d}.json", json.dumps({"caption": caption(index)}).encode())
                add(tar, f"{index:02d}.cls", str(index % 3).encode())
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_saved(root: Path, count: int) -> Path:
    """What `datasets` writes with `save_to_disk`."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["x", "y", "z", "never"]),
        }
    )
    values = rows(count)
    values["image"] = [{"bytes": data, "path": None} for data in values["image"]]
    datasets.Dataset.from_dict(values, features).save_to_disk(str(root))
    return root
