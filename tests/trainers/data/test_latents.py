from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainers.data.batch import draw_latents, load_microbatch
from trainers.data.config import DataConfig
from trainers.data.latents import EMPTY, FORMAT, INDEX
from trainers.data.samples import Source
from trainers.data.sources import open_source
from trainers.errors import ConfigError


def open_latents(path: Path, **changes: Any) -> Source:
    return open_source(DataConfig(source="latents", path=str(path), image_size=4, **changes))


def tensors(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    return {
        "mean": draw(4, 4, 4),
        "deviation": draw(4, 4, 4).exp(),
        "tokens": draw(3, 5).bfloat16(),
        "mask": torch.ones(count, 3, dtype=torch.bool),
        "labels": torch.arange(count),
    }


def write_prepared(folder: Path) -> list[dict[str, torch.Tensor]]:
    parts = [tensors(3), tensors(2, seed=1)]
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors")
    empty = {"tokens": torch.full((1, 3, 5), 9.0), "mask": torch.zeros(1, 3, dtype=torch.int64)}
    save_file(empty, folder / EMPTY)
    index = {"format": FORMAT, "shift": 0.1, "scale": 0.5, "shards": ["0.safetensors", "1.safetensors"]}
    (folder / INDEX).write_text(json.dumps(index))
    return parts


def test_rows_of_every_file(tmp_path: Path) -> None:
    parts = write_prepared(tmp_path)
    source = open_latents(tmp_path)
    assert len(source) == 5 and source.channels == 4 and source.num_classes == 3
    samples = source.read(np.array([4, 0, 2, 3]))
    wanted = [(1, 1), (0, 0), (0, 2), (1, 0)]
    for row, (file, place) in enumerate(wanted):
        assert torch.equal(samples.images[row], parts[file]["mean"][place])
        assert samples.text is not None and samples.text.tokens is not None and samples.labels is not None
        assert torch.equal(samples.text.tokens[row], parts[file]["tokens"][place].float())
        assert samples.labels[row] == parts[file]["labels"][place]


def test_a_batch_draws_its_latents_and_drops_its_captions(tmp_path: Path) -> None:
    parts = write_prepared(tmp_path)
    source = open_latents(tmp_path)
    batch = load_microbatch(source, np.arange(40), seed=1, augment=None, null_label=None, label_drop=0.5)
    again = load_microbatch(source, np.arange(40), seed=1, augment=None, null_label=None, label_drop=0.0)
    assert batch.posterior is None and batch.noise.shape == batch.images.shape == (40, 4, 4, 4)
    assert torch.equal(batch.images, again.images) and batch.text is not None and again.text is not None
    assert batch.text.tokens is not None and again.text.tokens is not None
    dropped = (batch.text.tokens == 9.0).flatten(1).all(1)
    assert 10 < dropped.sum() < 30 and torch.equal(batch.text.tokens[~dropped], again.text.tokens[~dropped])
    mean, deviation = (torch.cat([part[name] for part in parts])[list(batch.indices)] for name in ("mean", "deviation"))
    drawn = ((batch.images / 0.5 + 0.1) - mean) / deviation
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05
    assert torch.equal(draw_latents(mean, deviation, torch.zeros_like(mean), None, None), mean)


def test_npz_of_a_user(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(6, 2, 4, 4)).astype(np.float16)
    np.savez_compressed(tmp_path / "a.npz", latents=latents, labels=np.arange(6) % 2)
    source = open_latents(tmp_path / "a.npz")
    batch = load_microbatch(source, np.arange(6), seed=0, augment=None, null_label=2, label_drop=0.0)
    assert torch.equal(batch.images, torch.from_numpy(latents[list(batch.indices)]).float())
    assert (
        batch.labels is not None and source.num_classes == 2 and batch.labels.tolist() == [i % 2 for i in batch.indices]
    )


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: (folder / "0.safetensors").write_bytes(b"x" * 20), "no whole safetensors file"),
        (lambda folder: save_file({"mean": torch.zeros(2, 4, 4, 4)}, folder / "0.safetensors"), "has no deviation"),
        (lambda folder: save_file(tensors(2) | {"labels": torch.zeros(1)}, folder / "1.safetensors"), "as many rows"),
        (
            lambda folder: save_file(
                tensors(2) | {"mask": torch.ones(2, 3).to(torch.float8_e5m2)}, folder / "1.safetensors"
            ),
            "has tensors of F8_E5M2; make them F64, ",
        ),
        (lambda folder: (folder / INDEX).unlink(), "no index.json with shift and scale"),
        (lambda folder: (folder / INDEX).write_text('{"format": "other"}'), "format 'other' is not"),
        (lambda folder: (folder / INDEX).write_text('{"format": "o'), "index.json is damaged"),
        (lambda folder: (folder / INDEX).write_text("[]"), "format None is not"),
        (lambda folder: (folder / "1.safetensors").unlink(), "1.safetensors, which index.json names, is not there"),
        (
            lambda folder: (folder / "1.safetensors").write_bytes((7).to_bytes(8, "little") + b'{"a":1}'),
            "1.safetensors is no whole safetensors file",
        ),
        (
            lambda folder: save_file(tensors(2) | {"labels": torch.tensor([-1, 0])}, folder / "1.safetensors"),
            "labels such as 0 and -1 are no classes",
        ),
        (lambda folder: (folder / "0.safetensors").write_bytes((folder / "0.safetensors").read_bytes()[:-1]), "cut"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage: Any, word: str) -> None:
    write_prepared(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=word):
        open_latents(tmp_path)


def test_captions_are_encoded_already(tmp_path: Path) -> None:
    write_prepared(tmp_path)
    with pytest.raises(ConfigError, match="captions=true has no effect on latents"):
        open_latents(tmp_path, captions=True)
