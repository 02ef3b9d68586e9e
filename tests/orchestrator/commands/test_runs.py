from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from tests.orchestrator.tracking.story import CONFIG, one_kill, record


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def test_list(tmp_path: Path):
    for name in ("first", "second"):
        open_or_create(Store.open(str(tmp_path / name)), CONFIG)
    record(Store.open(str(tmp_path / "first")), one_kill())
    lines = unbroken("runs", "list", str(tmp_path)).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["RUN", "first", "second"]
    assert "finished" in lines[1] and "30 of 100" in lines[1] and "not started" in lines[2]
    rows = json.loads(unbroken("runs", "list", str(tmp_path), "--json").stdout)
    assert [(row["state"], row["step"]) for row in rows] == [("finished", 30), ("not started", 0)]


def test_nothing_there_and_a_run_instead_of_a_storage(tmp_path: Path):
    assert unbroken("runs", "list", str(tmp_path / "none")).stdout == f"no run in {tmp_path}/none\n"
    open_or_create(Store.open(str(tmp_path / "run")), CONFIG)
    assert "is a run itself: unbroken status" in unbroken("runs", "list", str(tmp_path / "run")).stdout
