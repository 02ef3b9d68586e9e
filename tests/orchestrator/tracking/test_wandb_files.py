"""Reading W&B's transaction logs, whole, cut off and from near their end, without holding them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from itertools import chain
from pathlib import Path

import pytest

from orchestrator.tracking.wandb_files import last_records, records

BLOCK = 32768


def log(contents: list[bytes]) -> bytes:
    """As LevelDB's format has it."""
    data = bytearray(b"\0" * 7)
    for content in contents:
        rest, first = content, True
        while first or rest:
            left = BLOCK - len(data) % BLOCK
            if left < 7:
                data += b"\0" * left
                left = BLOCK
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            data += struct.pack("<LHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
    return bytes(data)


SIZES = [5, 0, 40_000, BLOCK - 14 - 7, 3, 100_000, *range(1000, 1040), BLOCK, 17]
CONTENTS = [bytes([index % 251]) * size for index, size in enumerate(SIZES)]


def test_every_record_whatever_blocks_it_lies_in(tmp_path: Path):
    (tmp_path / "log").write_bytes(log(CONTENTS))
    assert list(records(tmp_path / "log")) == CONTENTS == list(last_records(tmp_path / "log"))


@pytest.mark.parametrize("cut", [1, 8, 20, 30, 33_000, 60_000, 150_000])
def test_a_log_that_was_cut_off_ends_with_the_last_whole_record(tmp_path: Path, cut: int):
    (tmp_path / "log").write_bytes(log(CONTENTS)[:-cut])
    whole = next(n for n in range(len(CONTENTS), -1, -1) if len(log(CONTENTS[:n])) <= len(log(CONTENTS)) - cut)
    assert list(records(tmp_path / "log")) == CONTENTS[:whole]


def test_the_end_of_a_long_log_and_all_of_it_take_little_memory(tmp_path: Path):
    contents = [b"%9d" % index * 50 for index in range(20_000)]
    (tmp_path / "log").write_bytes(log(contents))
    size = (tmp_path / "log").stat().st_size
    assert size > 8 << 20
    tracemalloc.start()
    try:
        counts = [sum(1 for _ in read(tmp_path / "log")) for read in (last_records, records)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts[1] == 20_000 and 1 << 20 <= counts[0] * 500 <= 2 << 20
    assert peak < 256 << 10, peak
    *_, last = chain(last_records(tmp_path / "log"))
    assert last == contents[-1]
