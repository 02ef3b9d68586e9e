"""Rows that can be tried out in seconds, and the programs of the others."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.programs import under_torchrun, workplace, write_config
from bench.throughput import _ACCELERATE, _BARE, _measure_arms, _run_config
from bench.workload import SMOKE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_rows_can_be_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not only the benchmark's
    main(["reduction", "ema", "scale", "--quick"])
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
