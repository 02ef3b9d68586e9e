"""How a tensor lies over ranks: every rank holds a range of rows of dimension 0."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor of the state as a whole. A 0-dimensional tensor counts as one row."""

    name: str
    """`model/<parameter>`, `ema/<profile>/<parameter>`, `optimizer/exp_avg/<parameter>`, ..."""
    dtype: str
    """In safetensors' words: F32, BF16, I64, ..."""
    shape: tuple[int, ...]
    """Global shape."""

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows `row_offset : row_offset + num_rows` of a tensor, at bytes `begin : end` of some buffer."""

    spec: TensorSpec
    row_offset: int
    num_rows: int
    begin: int
    end: int


DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
