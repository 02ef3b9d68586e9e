from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.data import made_up
from trainers.data.batch import Batch, load_microbatch
from trainers.data.config import BucketConfig, ColorJitter, DataConfig
from trainers.data.samples import Source
from trainers.data.sources import open_source
from trainers.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.write_folder(tmp_path_factory.mktemp("augment") / "images", 12)


def load(folder: Path, positions: Any, **data: Any) -> Batch:
    config = DataConfig(source="folder", path=str(folder), image_size=8, **data)
    source: Source = open_source(config)
    return load_microbatch(source, np.asarray(positions), seed=3, augment=config, null_label=None, label_drop=0.0)


EVERYTHING = {
    "crop": "random",
    "flip": True,
    "rotation": 30.0,
    "color": ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
}


def test_a_sample_is_changed_the_same_alone_and_in_any_company(folder: Path) -> None:
    whole = load(folder, np.arange(12), **EVERYTHING)
    assert whole.images.min() >= -1 and whole.images.max() <= 1 and whole.sizes is not None
    for position in range(12):
        alone = load(folder, [position], **EVERYTHING)
        assert alone.sizes is not None
        assert torch.equal(alone.images[0], whole.images[position])
        assert torch.equal(alone.sizes[0], whole.sizes[position])
    again = load(folder, np.arange(12, 24), **EVERYTHING)  # the next epoch, another draw
    assert not torch.equal(whole.images.sum((1, 2, 3)).sort().values, again.images.sum((1, 2, 3)).sort().values)


@pytest.mark.parametrize(
    "change",
    [{"rotation": 30.0}, {"crop": "random"}]
    + [{"color": ColorJitter(**{key: 0.4})} for key in ("brightness", "contrast", "saturation", "hue")],
    ids=str,
)
def test_every_option_changes_something_else(folder: Path, change: dict[str, Any]) -> None:
    plain, changed = load(folder, np.arange(12)), load(folder, np.arange(12), **change)
    different = (plain.images != changed.images).flatten(1).any(1)
    assert different.sum() >= 6 and torch.equal(plain.noise, changed.noise)


def test_what_was_cut_is_told(folder: Path) -> None:
    """Crop and flip reach the sizes that SDXL is conditioned on."""
    center, random = load(folder, np.arange(12)), load(folder, np.arange(12), crop="random")
    flipped = load(folder, np.arange(12), crop="random", flip=True)
    assert center.sizes is not None and random.sizes is not None and flipped.sizes is not None
    mirrored = (random.images != flipped.images).flatten(1).any(1)
    assert 2 <= mirrored.sum() <= 10
    assert torch.equal(flipped.images[mirrored], random.images[mirrored].flip(-1))
    cuts = set()
    for plain, cut, other, is_mirrored in zip(center.sizes, random.sizes, flipped.sizes, mirrored, strict=True):
        height, width, top, left = plain[:4].tolist()
        scale = 8 / min(height, width)
        slack = [int(side * scale - 8) for side in (height, width)]
        assert [top, left] == [side // 2 for side in slack]
        assert 0 <= cut[2] <= slack[0] and 0 <= cut[3] <= slack[1]
        assert other[3] == (slack[1] - cut[3] if is_mirrored else cut[3]) and other[2] == cut[2]
        cuts.add(tuple(cut[2:4].tolist()))
    assert len(cuts) > 4


def test_a_turn_of_a_right_angle_is_exact() -> None:
    from trainers.data.augment import _turned

    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    assert np.array_equal(_turned(image, 90)[0], np.rot90(image[0]))
    assert np.array_equal(_turned(image, 0.0), image)


def test_a_microbatch_is_of_one_bucket_and_an_epoch_has_everything(folder: Path, tmp_path: Path) -> None:
    wide = BucketConfig(multiple_of=4, max_ratio=4.0)
    config = DataConfig(source="folder", path=str(folder), image_size=8, buckets=wide, cache=str(tmp_path))
    source = open_source(config)
    buckets = source.buckets
    assert buckets is not None and len(set(buckets.of.tolist())) > 1
    per_epoch = int(sum(-(-count // 4) for count in np.bincount(buckets.of)))
    orders = []
    for epoch in range(2):
        order = []
        for number in range(per_epoch):
            positions = 4 * (epoch * per_epoch + number) + np.arange(4)
            batch = load_microbatch(source, positions, seed=3, augment=config, null_label=None, label_drop=0.0)
            (bucket,) = {int(buckets.of[index]) for index in batch.indices}
            assert batch.images.shape[2:] == batch.noise.shape[2:] == buckets.shapes[bucket]
            order.append(batch.indices)
        assert {index for indices in order for index in indices} == set(range(12)), "every sample, every epoch"
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rotation": 200.0}, "rotation=200.0 is out of range"),
        ({"source": "digits", "path": None, "crop": "random"}, "square images only"),
        ({"source": "latents", "flip": True}, "flip has no effect on source=latents"),
        ({"quarantine": True, "num_workers": 2}, "quarantine=true needs num_workers=0"),
        ({"buckets": BucketConfig(multiple_of=3)}, "not a multiple of buckets.multiple_of=3"),
        ({"split": "train"}, "split=train has no effect"),
        ({"prefetch": 0}, "prefetch=0 must be at least 1"),
    ],
)
def test_refusals(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        DataConfig(**{"source": "folder", "path": "x", **changes})


def test_color_and_bucket_ranges() -> None:
    for make, word in (
        (lambda: ColorJitter(contrast=1.0), "contrast=1.0"),
        (lambda: ColorJitter(hue=0.6), "hue=0.6"),
        (lambda: BucketConfig(max_ratio=0.5), "max_ratio=0.5"),
        (lambda: BucketConfig(multiple_of=0), "multiple_of=0"),
    ):
        with pytest.raises(ConfigError, match=word):
            make()
