"""Reads a finished run with nothing of ours: JSON, and the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest committed checkpoint, put together from the shards."""
    folder = max(manifest.parent for manifest in run.glob("checkpoints/*/manifest.json"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert not (folder / "quarantine.json").exists()
    shards = [safe_open(folder / entry["name"], framework="pt") for entry in manifest["files"]]
    return {
        name: _whole(entry["shape"], [(row, shards[file].get_tensor(name)) for file, _, _, row, *_ in entry["chunks"]])
        for name, entry in manifest["tensors"].items()
    }


def _whole(shape: list[int], chunks: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    if not shape:
        return chunks[0][1]
    whole = torch.cat([rows for _, rows in sorted(chunks, key=lambda chunk: chunk[0])])
    assert list(whole.shape) == shape
    return whole


def assert_same_state(a: Path, b: Path) -> None:
    """Bitwise: parameters, every EMA profile, AdamW's moments, generators."""
    ours, theirs = final_tensors(a), final_tensors(b)
    assert ours.keys() == theirs.keys()
    groups = {name.split("/")[0] for name in ours}
    assert {"model", "ema", "optimizer", "rng"} <= groups
    different = [name for name in ours if not torch.equal(bits(ours[name]), bits(theirs[name]))]
    assert different == []


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bytes: 0.0 and -0.0 are not the same, and a NaN is itself."""
    return tensor.reshape(-1).view(torch.uint8)
