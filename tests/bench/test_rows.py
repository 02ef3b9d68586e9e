"""Rows that can be tried out in seconds, and the programs of the others."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import ROWS, main
from bench.programs import under_torchrun, workplace, write_config
from bench.throughput import _ACCELERATE, _BARE, _measure_arms, _run_config
from bench.workload import SMOKE

QUICK = ("reduction", "ema", "scale")
"""Rows that take seconds with `--quick`."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_row_can_be_imported():
    for row in ROWS:
        assert callable(importlib.import_module(f"bench.{row}").measure), row


@pytest.mark.skipif("UNBROKEN_TEST_LONG" not in os.environ, reason="takes minutes: UNBROKEN_TEST_LONG=1")
@pytest.mark.parametrize("row", [row for row in ROWS if row not in QUICK])
def test_long_rows_can_be_measured(row: str):
    command = [sys.executable, "-m", "bench", row, "--quick"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, errors = process.communicate(timeout=800)
        finally:
            process.terminate()  # not killed: it ends what it has started
    assert process.returncode == 0, errors
    assert f"## {row}" in printed


def test_rows_can_be_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not only the benchmark's
    main([*QUICK, "--quick"])
    printed = capsys.readouterr().out
    assert "invariant | " in printed and "collectives in an update: 0" in printed
    assert "| commit: exponent in ranks | " in printed and "steps lost: " in printed


def test_programs_step_in_turn():
    every = _measure_arms(_run_config(SMOKE, "ddp"), [_BARE, _ACCELERATE], turns=2, steps=1)
    assert {name: [len(times) for times in turns] for name, turns in every.items()} == {
        _BARE: [1, 1],
        _ACCELERATE: [1, 1],
    }


@pytest.mark.chaos
def test_torchs_checkpoints_are_gone_on_from():
    with workplace() as folder:
        file, dcp = write_config(folder, _run_config(SMOKE, "fsdp")), folder / "dcp"
        dcp.mkdir()
        with under_torchrun("dcp", "bench.peers.dcp_loop", [str(file), str(dcp), "2"]) as arm:
            lines = arm.wait_for(lambda line: line["kind"] == "saved" and line["step"] >= 4)
            os.kill(next(line["pid"] for line in lines if line["kind"] == "imported"), signal.SIGKILL)
            restored = arm.wait_for(lambda line: line["kind"] == "restored" and line["step"] > 0, 300)[-1]
            assert restored["step"] % 2 == 0 and restored["step"] >= 4
            arm.wait_for(lambda line: line["kind"] == "step" and line["step"] == restored["step"] + 1)
        assert [Path(name).name for name in sorted(dcp.glob("[0-9]*"))][-1] >= f"{restored['step']:09d}"
