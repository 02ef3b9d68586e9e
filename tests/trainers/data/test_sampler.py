from __future__ import annotations

import numpy as np

from trainers.data.sampler import sample_indices


def test_every_sample_once_an_epoch_in_a_new_order():
    indices = sample_indices(3, np.arange(300), 100).reshape(3, 100)
    for epoch in indices:
        assert sorted(epoch) == list(range(100))
    assert len({tuple(epoch) for epoch in indices}) == 3


def test_independent_of_batch_cuts_and_order():
    whole = sample_indices(3, np.arange(1000), 97)
    for size in (1, 7, 64, 333):
        parts = [sample_indices(3, np.arange(i, min(i + size, 1000)), 97) for i in range(0, 1000, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    mixed = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(sample_indices(3, mixed, 97), whole[mixed])


def test_depends_on_the_seed_beyond_32_bits():
    orders = {tuple(sample_indices(seed, np.arange(50), 50)) for seed in (0, 1, 1 << 32, 1 << 62)}
    assert len(orders) == 4
