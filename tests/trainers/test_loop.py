from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.__main__ import main
from trainers.loop import train
from trainers.ports import Directive
from trainers.progress import Progress
from trainers.state import TrainState

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_unet.json"


class Recorder:
    """All three ports at once: notes what the loop asks for."""

    def __init__(self, save_at: int = 0, stop_at: int = 0, start_at: int = 0) -> None:
        self.calls: list[object] = []
        self.metrics: list[dict[str, float]] = []
        self._save_at, self._stop_at, self._start_at = save_at, stop_at, start_at

    def restore(self, state: TrainState) -> None:
        self.calls.append("restore")
        for _ in range(self._start_at):
            state.progress = state.progress.advance(24)

    def save(self, state: TrainState) -> None:
        self.calls.append(("save", state.progress.step))

    def wait(self) -> None:
        self.calls.append("wait")

    def poll(self, progress: Progress) -> Directive:
        return Directive(save=progress.step == self._save_at, stop=progress.step == self._stop_at)

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        self.calls.append(progress.step)
        self.metrics.append(dict(metrics))


def run_loop(**moments: int) -> tuple[list[object], list[dict[str, float]]]:
    state, task = build_tiny({**tiny_config(), "ema": {}})
    recorder = Recorder(**moments)
    train(state, task, recorder, recorder, recorder)
    return recorder.calls, recorder.metrics


@pytest.mark.parametrize(
    ("moments", "calls"),
    [
        ({}, ["restore", 1, 2, 3, 4, "wait"]),
        ({"save_at": 2}, ["restore", 1, 2, ("save", 2), 3, 4, "wait"]),
        ({"save_at": 3, "stop_at": 3}, ["restore", 1, 2, 3, ("save", 3), "wait"]),
        ({"start_at": 3}, ["restore", 4, "wait"]),
        ({"start_at": 4}, ["restore", "wait"]),
    ],
)
def test_order_of_calls(moments: dict[str, int], calls: list[object]) -> None:
    assert run_ranks(1, _run_loop, moments)[0][0] == calls


def _run_loop(moments: dict[str, int]) -> tuple[list[object], list[dict[str, float]]]:
    return run_loop(**moments)


def test_the_loss_curve_is_that_of_the_golden_file() -> None:
    """A change that is not meant to alter numbers alters none: rewrite the file only on purpose."""
    _, metrics = run_ranks(1, _run_loop, {})[0]
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == len(metrics)
    for step, expected in zip(metrics, golden, strict=True):
        # A tolerance, because the file is compared on other kinds of CPU than the one that wrote it.
        assert step == pytest.approx(expected, rel=1e-4)


def test_a_config_that_does_not_work_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(data={"source": "folder", "path": "/nowhere"})))
    monkeypatch.setattr(sys, "argv", ["trainers", str(tmp_path / "config.json")])
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr("trainers.build.make_topology", lambda config, device: (SimpleNamespace(world_size=1), None))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = "error: data.path=/nowhere is not there as a folder; give the folder, file or URL of the data\n"
    assert capsys.readouterr().err == line


def test_a_folder_that_is_taken_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    monkeypatch.setattr(sys, "argv", ["trainers", str(tmp_path / "config.json"), "--out", str(tmp_path)])
    monkeypatch.setattr(dist, "init_process_group", lambda backend: pytest.fail("it begins to train"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "is not an empty folder; remove it" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_without_ray(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config(samples={"every_steps": 2, "num_images": 2, "num_steps": 1})))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "trainers", str(config), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "step 4/4" in result.stdout and "fingerprint of the state after step 4: " in result.stdout
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert drawn == [f"out-samples/slow/{step:09d}.png" for step in (2, 4)]
