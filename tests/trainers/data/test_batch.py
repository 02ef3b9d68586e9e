from __future__ import annotations

import numpy as np
import pytest
import torch

from trainers.data.batch import load_microbatch
from trainers.data.config import DataConfig
from trainers.data.sources import open_source


@pytest.fixture(scope="module")
def source():
    return open_source(DataConfig())


def load(source, positions, **changes):
    settings = {"seed": 5, "augment": DataConfig(flip=True), "null_label": 10, "label_drop": 0.3}
    return load_microbatch(source, np.asarray(positions), **{**settings, **changes})


def test_a_sample_is_the_same_alone_and_in_any_company(source):
    whole = load(source, np.arange(1790, 1800))
    for offset in range(10):
        alone = load(source, [1790 + offset])
        for name in ("images", "labels", "noise", "uniform"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[offset]), name


def test_shapes_and_types(source):
    batch = load(source, np.arange(6))
    assert batch.images.shape == batch.noise.shape == (6, 1, 8, 8)
    assert batch.images.dtype == batch.noise.dtype == torch.float32
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64 and batch.uniform.dtype == torch.float64


def test_shares_of_dropped_labels_and_flips(source):
    positions = np.arange(1797)
    batch, plain = load(source, positions), load(source, positions, augment=None, label_drop=0.0)
    assert batch.labels is not None and plain.labels is not None
    dropped = batch.labels == 10
    assert 0.25 < dropped.float().mean() < 0.35
    assert torch.equal(batch.labels[~dropped], plain.labels[~dropped]) and plain.labels.max() == 9
    flipped = (batch.images != plain.images).flatten(1).any(1)
    assert 0.45 < flipped.float().mean() < 0.55
    assert torch.equal(batch.images[flipped], plain.images[flipped].flip(-1))
    # One draw for both would flip exactly the samples without a label.
    assert 0.4 < flipped[dropped].float().mean() < 0.6


def test_a_model_without_classes_gets_no_labels(source):
    assert load(source, [0, 1], null_label=None).labels is None


def test_the_same_sample_gets_new_noise_in_the_next_epoch(source):
    first, second = load(source, np.arange(1797)), load(source, np.arange(1797, 2 * 1797))
    assert not torch.equal(first.noise.sum((1, 2, 3)).sort().values, second.noise.sum((1, 2, 3)).sort().values)
    assert first.noise.mean().abs() < 0.02 and abs(first.noise.std() - 1) < 0.02
    assert not torch.equal(first.uniform, second.uniform)


def test_dropped_captions_are_empty():
    source = open_source(DataConfig(captions=True))
    batch = load(source, np.arange(200), null_label=None)
    plain = load(source, np.arange(200), null_label=None, label_drop=0.0)
    assert batch.captions is not None and plain.captions is not None and "" not in plain.captions
    dropped = [not caption for caption in batch.captions]
    assert 30 < sum(dropped) < 90
    assert all(
        drop or ours == theirs for drop, ours, theirs in zip(dropped, batch.captions, plain.captions, strict=True)
    )


def test_a_latent_has_noise_of_its_own_shape():
    batch = load(open_source(DataConfig()), [3, 4], latent_factor=(4, 4))
    assert batch.posterior is not None and batch.noise.shape == batch.posterior.shape == (2, 4, 2, 2)
    assert not torch.equal(batch.noise, batch.posterior)
