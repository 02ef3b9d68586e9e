from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import report, s3, save
from bench.not_measured import NotMeasured
from bench.room import available_bytes, missing_room

MEMINFO = "MemTotal:       24000000 kB\nMemFree:  100 kB\nMemAvailable:   20000000 kB\n"


def usage(free: int) -> SimpleNamespace:
    return SimpleNamespace(free=free)


def machine(folder: Path, **files: str) -> tuple[Path, Path]:
    """A machine with 20.48 GB left, and a container on it."""
    (folder / "meminfo").write_text(MEMINFO)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder / "meminfo", folder


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 20_480_000_000),
        ({"memory_max": "max\n", "memory_current": "7\n"}, 20_480_000_000),
        ({"memory_max": "8000\n", "memory_current": "3000\n"}, 5000),
        ({"memory_max": "8000", "memory_current": "3000", "memory_stat": "anon 1\ninactive_file 500\n"}, 5500),
        ({"memory_max": "90000000000\n", "memory_current": "3000\n"}, 20_480_000_000),
    ],
)
def test_what_is_left_is_the_machines_or_the_containers(files: dict[str, str], left: int, tmp_path: Path) -> None:
    assert available_bytes(*machine(tmp_path, **files)) == left


def test_what_is_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.room.available_bytes", lambda: 9_000_000_000)
    assert missing_room(memory_bytes=9_000_000_000) is None
    told = "9.0 GB of memory are available; 14.0 GB are needed"
    assert missing_room(memory_bytes=14_000_000_000) == told
    assert f"{tmp_path} has " in str(missing_room(disk_bytes=1 << 60, folder=str(tmp_path)))


def test_saves_are_not_measured_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, reason = [], "9.0 GB of memory are available; 14.0 GB are needed"

    def missing(*, disk_bytes: int, memory_bytes: int) -> str:
        wanted.append((disk_bytes, memory_bytes))
        return reason

    monkeypatch.setattr(save, "missing_room", missing)
    results = save.measure(quick=False)
    assert wanted == [(12 << 30, 14 * 10**9)]
    assert results == [NotMeasured(name="save", reason=reason)]
    assert report.reasons("save", results) == f"save: not measured: {reason}"


def test_saves_to_s3_are_not_measured_in_a_container_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(64_000_000 if folder == "/dev/shm" else 1 << 50))
    reason = "/dev/shm has 0.1 GB left; 7.5 GB are needed"
    assert s3.measure(quick=False) == [NotMeasured(name="s3", reason=reason)]
