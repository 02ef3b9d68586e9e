from __future__ import annotations

import numpy as np
import pytest
import xxhash

from trainers.fingerprint import combine, format_fingerprint, partial_fingerprint
from trainers.shards import DTYPE_BYTES, TensorSpec

MASK = (1 << 64) - 1

SPECS = [
    TensorSpec(name="wide", dtype="F32", shape=(7, 64)),
    TensorSpec(name="wide bf16", dtype="BF16", shape=(5, 3, 50)),
    TensorSpec(name="narrow", dtype="F32", shape=(9, 63)),
    TensorSpec(name="vector", dtype="F64", shape=(13,)),
    TensorSpec(name="bf16", dtype="BF16", shape=(11, 3)),
    TensorSpec(name="bool", dtype="BOOL", shape=(17,)),
    TensorSpec(name="scalar", dtype="I64", shape=()),
]


def random_bytes(spec: TensorSpec, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, spec.num_rows * spec.row_bytes, np.uint8)


def whole(spec: TensorSpec, raw: np.ndarray) -> int:
    return partial_fingerprint(spec, 0, memoryview(raw))


def by_definition(spec: TensorSpec, raw: bytes) -> int:
    """The module docstring once more, in plain integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    if spec.row_bytes >= 256:
        rows = [raw[i : i + spec.row_bytes] for i in range(0, len(raw), spec.row_bytes)]
        return sum(xxhash.xxh3_64_intdigest(row, seed=r) for r, row in enumerate(rows)) & MASK
    width = DTYPE_BYTES[spec.dtype]
    elements = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
    return sum(mix(v ^ mix(p)) for p, v in enumerate(elements)) & MASK


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_equals_the_written_definition(spec):
    raw = random_bytes(spec)
    assert whole(spec, raw) == by_definition(spec, raw.tobytes())


def test_known_values_never_change():
    narrow = TensorSpec(name="n", dtype="F32", shape=(3, 2))
    wide = TensorSpec(name="w", dtype="F32", shape=(3, 64))
    assert format_fingerprint(whole(narrow, np.arange(6, dtype="<f4"))) == "b0088b081c29be3f"
    assert format_fingerprint(whole(wide, np.arange(192, dtype="<f4"))) == "d70ca1ad2073c751"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_cut_into_rows_gives_the_same_sum(spec):
    raw = random_bytes(spec)
    expected = whole(spec, raw)
    rows = raw.reshape(spec.num_rows, spec.row_bytes)
    for first in range(spec.num_rows + 1):
        for second in range(first, spec.num_rows + 1):
            cuts = [(0, first), (first, second), (second, spec.num_rows)]
            parts = [partial_fingerprint(spec, begin, rows[begin:end]) for begin, end in cuts]
            assert combine(reversed(parts)) == expected


def test_a_cut_inside_and_across_blocks_gives_the_same_sum():
    spec = TensorSpec(name="long", dtype="F32", shape=(20_001,))
    raw = random_bytes(spec)
    for cut in (1, 16383, 16384, 16385, 20_000):
        parts = [partial_fingerprint(spec, 0, raw[: 4 * cut]), partial_fingerprint(spec, cut, raw[4 * cut :])]
        assert combine(parts) == whole(spec, raw)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_single_bit_counts(spec):
    raw = random_bytes(spec)
    seen = {whole(spec, raw)}
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << (bit % 8)
        seen.add(whole(spec, raw))
        raw[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == 1 + 8 * len(raw)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.num_rows > 1], ids=lambda spec: spec.name)
@pytest.mark.parametrize("fill", ["random", "sparse"])
def test_swapping_two_different_rows_counts(spec, fill):
    raw = random_bytes(spec)
    if fill == "sparse":  # all rows zero but one
        raw[:] = 0
        raw[0] = 1
    rows = raw.reshape(spec.num_rows, spec.row_bytes)
    original = whole(spec, raw)
    for i in range(spec.num_rows):
        for j in range(i):
            swapped = rows.copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert (whole(spec, swapped) == original) == np.array_equal(rows[i], rows[j])


def test_swapping_two_elements_within_a_narrow_row_counts():
    spec = TensorSpec(name="n", dtype="F32", shape=(4, 6))
    values = np.arange(24, dtype="<f4")
    original = whole(spec, values)
    for i in range(24):
        for j in range(i):
            swapped = values.copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert whole(spec, swapped) != original


def test_zeros_of_different_shapes_differ():
    fingerprints = {
        whole(spec, np.zeros(spec.num_rows * spec.row_bytes, np.uint8))
        for spec in (TensorSpec(name="z", dtype="F32", shape=shape) for shape in [(1,), (2,), (3,), (1, 64), (2, 64)])
    }
    assert len(fingerprints) == 5


def test_unaligned_buffers_are_read_as_they_lie():
    spec = SPECS[2]
    raw = random_bytes(spec)
    shifted = np.concatenate([np.zeros(1, np.uint8), raw])
    assert partial_fingerprint(spec, 0, memoryview(shifted)[1:]) == whole(spec, raw)


@pytest.mark.parametrize("shape", [(0,), (0, 100), (5, 0)])
def test_a_tensor_without_bytes_is_zero(shape):
    spec = TensorSpec(name="empty", dtype="F32", shape=shape)
    assert partial_fingerprint(spec, 0, np.zeros(shape, np.float32)) == 0
    assert format_fingerprint(combine([])) == "0000000000000000"


def test_half_a_row_is_our_bug():
    with pytest.raises(AssertionError):
        partial_fingerprint(SPECS[0], 0, np.zeros(255, np.uint8))
    with pytest.raises(AssertionError):
        partial_fingerprint(SPECS[0], 7, np.zeros(256, np.uint8))
