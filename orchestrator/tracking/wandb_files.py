"""W&B's local transaction logs (`run-<id>.wandb`), as wandb 0.31 writes them: what a killed process had on disk.

A 7-byte header, then a record log in LevelDB's format: blocks of 32 KiB; each chunk has a header of CRC32, length and
type (1 whole, 2 first, 3 middle, 4 last part of a record).
Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 32768
_HEADER = struct.Struct("<LHB")
_TAIL_BYTES = 32 * _BLOCK_BYTES
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def logs(folder: Path, run_id: str) -> list[Path]:
    """The logs of a run below W&B's folder, online and offline ones, newest first."""
    # The folders are called run-<time>-<id> and offline-run-<time>-<id>: sort by the time.
    paths = folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-"), reverse=True)


def records(path: Path) -> Iterator[bytes]:
    """Every intact record; a log that was cut off ends with the last whole one."""
    return _records(path, 7)


def last_records(path: Path) -> Iterator[bytes]:
    """The records in about the last MiB."""
    begin = max(0, path.stat().st_size - _TAIL_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
    return _records(path, begin or 7)


def _records(path: Path, begin: int) -> Iterator[bytes]:
    """Args: begin: of a block, or of the first chunk of the log."""
    parts: list[bytes] | None = None
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(_BLOCK_BYTES - file.tell() % _BLOCK_BYTES):
            position = 0
            while position + _HEADER.size <= len(block):
                checksum, length, kind = _HEADER.unpack_from(block, position)
                position += _HEADER.size
                chunk = block[position : position + length]
                known = kind in (_WHOLE, _FIRST, _MIDDLE, _LAST)
                if not known or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
                    return
                position += length
                if kind in (_WHOLE, _FIRST):
                    parts = []
                if parts is None:
                    continue  # the rest of a record that began before
                parts.append(chunk)
                if kind in (_WHOLE, _LAST):
                    yield b"".join(parts)
                    parts = None
