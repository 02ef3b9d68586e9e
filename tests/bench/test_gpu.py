"""The row `gpu` on a CPU, with small models: all of it but CUDA's own calls, which take a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, report
from bench.__main__ import main
from bench.comparison import Comparison
from bench.figure import Figure
from bench.not_measured import NotMeasured
from bench.on_gpu import resume, upkeep
from bench.on_gpu.device import kernels
from bench.on_gpu.limits import Limits
from bench.on_gpu.models import SUBJECTS, Counted, count
from bench.on_gpu.snapshots import Snapshots
from bench.on_gpu.steps import BARE, SAME_KERNELS
from tests.architectures import ARCHITECTURES

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMITS = Limits(device="NVIDIA H200", matmul_flops=8e14, copy_bytes=4e12, to_host_bytes=5e10, to_device_bytes=5e10)
WITHOUT = """
import importlib.abc, sys
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Without())
import {module}
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither under torchrun nor beside a GPU, and nothing that a run needs is left set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)


def results(only: str) -> list[gpu.Result]:
    found = list(gpu.measure(quick=True, only=only))
    assert [one for one in found if isinstance(one, NotMeasured)] == []
    return found


@pytest.mark.parametrize("part", ["sd2-unet", "dit-xl-2"])
def test_a_part_is_measured_whole(part: str) -> None:
    found = results(part)
    pairs = [(one.name, one.reference_name) for one in found if isinstance(one, Comparison)]
    assert (f"{part}: a step", BARE) in pairs and (f"{part}: a step", SAME_KERNELS) in pairs
    assert (f"{part}: EMA update", "copy of as many bytes") in pairs
    assert [name for name, other in pairs if other == "the fastest kernels"] == [
        f"{part}: a step, deterministic kernels"
    ]
    stalls = [one for one in found if isinstance(one, Comparison) and "stall of a save" in one.name]
    assert len(stalls) == 2 and all(one.goal == 1.15 for one in stalls[:1])
    figures = {one.name: one for one in found if isinstance(one, Figure)}
    assert figures[f"{part}: {resume.NAME}"].value == 1.0
    for what in ("MFU, of the measured matrix product", "digest, share of 50 steps", "EMA update, share of a step"):
        assert figures[f"{part}: {what}"].value > 0
    assert figures["limits: bf16 matrix product"].notes["device"] == "CPU"


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)  # torch's
def test_a_compiled_part_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_nothing(function: Callable[..., object], **_: object) -> Callable[..., object]:
        compiled.append(function)
        return function

    if "UNBROKEN_TEST_LONG" not in os.environ:  # it takes minutes on a CPU
        monkeypatch.setattr(torch, "compile", compile_nothing)
    part = "dit-xl-2-compiled"
    found = results(part)
    others = {one.reference_name for one in found if isinstance(one, Comparison) and one.name == f"{part}: a step"}
    assert others == {BARE}
    figures = {one.name: one for one in found if isinstance(one, Figure)}
    assert figures[f"{part}: MFU, of the measured matrix product"].goal == 35.0
    assert figures[f"{part}: {resume.NAME}"].value == 1.0
    # Of two blocks ours leaves the first one out, as a part of it is called from outside.
    assert "UNBROKEN_TEST_LONG" in os.environ or len(compiled) == 3


def test_a_resume_that_is_not_bitwise_is_told_and_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    load = Snapshots.load

    def load_wrongly(self: Snapshots) -> None:
        load(self)
        with torch.no_grad():
            self._state.parameters[0].local.view(-1)[0].add_(1e-3)

    monkeypatch.setattr(Snapshots, "load", load_wrongly)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process is not only the benchmark's
    for piece in ("ema", "hashes", "staging"):
        monkeypatch.setattr(upkeep, piece, lambda *_: [])
    monkeypatch.setattr(gpu._Part, "_beside_bare", lambda *_: [])
    monkeypatch.setattr(gpu, "cost_of_determinism", lambda *_: Figure(name="skipped", value=0.0))
    with pytest.raises(SystemExit, match=f"failed: dit-xl-2: {resume.NAME.split('(')[0]}"):
        main(["gpu", "--quick", "--only", "dit-xl-2"])
    assert f"| dit-xl-2: {resume.NAME} | 0 | >= 1 | missed |" in capsys.readouterr().out


def test_a_piece_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_kernel(*_: object) -> None:
        raise RuntimeError("upsample_backward has no deterministic form\n(a long stack)")

    monkeypatch.setattr(gpu, "beside_bare", no_such_kernel)
    monkeypatch.setattr(upkeep, "hashes", no_such_kernel)
    monkeypatch.setattr(upkeep, "staging", no_such_kernel)
    monkeypatch.setattr(gpu, "cost_of_determinism", no_such_kernel)
    found = list(gpu.measure(quick=True, only="dit-xl-2"))
    reason = "RuntimeError: upsample_backward has no deterministic form"
    told = {one.name: one.reason for one in found if isinstance(one, NotMeasured)}
    what = ("a step", "hashes of the state", "stall of a save", "a step, deterministic kernels")
    assert told == {f"dit-xl-2: {name}": reason for name in what}
    names = [one.name for one in found if not isinstance(one, NotMeasured)]
    assert names[-2:] == ["dit-xl-2: EMA update", f"dit-xl-2: {resume.NAME}"]


def test_a_device_that_is_too_small_is_told_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "free_bytes", lambda _: 23_000_000_000)
    monkeypatch.setattr(gpu, "count", lambda *_: Counted(num_parameters=866_000_000, flops=1))
    found = list(gpu.measure(quick=True, only="sd2-unet"))
    assert found[-1] == NotMeasured(name="sd2-unet", reason="two states take 34.6 GB, and the device has 23.0 GB left")


def test_a_host_that_is_too_small_is_told_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.room.available_bytes", lambda: 1000)
    for piece in ("_beside_bare", "_upkeep"):
        monkeypatch.setattr(gpu._Part, piece, lambda *_: [])
    found = list(gpu.measure(quick=True, only="dit-xl-2"))
    told = [one for one in found if isinstance(one, NotMeasured)]
    assert [one.name for one in told] == ["dit-xl-2: saves and restores"]
    assert "GB of memory are available" in told[0].reason


def test_without_a_gpu_one_line_says_so_and_nothing_is_invented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    main(["gpu"])
    assert capsys.readouterr().out == "gpu: not measured: no GPU here\n"
    assert "| [gpu](#gpu) | gpu | not measured: no GPU here | | |" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "gpu.svg").exists()
    # What was measured elsewhere is not thrown away.
    measured = [Figure(name="limits: bf16 matrix product", value=790.0)]
    report.store("gpu", {"gpu": "NVIDIA H200", "cores": 16, "cpu": "", "time": ""}, measured, tmp_path)
    main(["gpu"])
    assert report.load("gpu", tmp_path)[1] == measured


def test_the_row_needs_no_ray() -> None:
    names = ["ray", "omegaconf"]
    for module in ("bench.gpu", "bench.report", "bench.__main__"):
        code = WITHOUT.format(names=names, module=module)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_ranks_measure_together_and_one_of_them_says_so() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "bench"]
    command += ["gpu", "--quick", "--only", "dit-xl-2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("## gpu") == 1 and "; GPUs: 2; samples in a step: 4;" in done.stdout
    assert f"| dit-xl-2: {resume.NAME} | 1 | >= 1 | holds |" in done.stdout and "not measured" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["gpu", "ema", "--only", "sd2-unet"], {}, "--only is for the row gpu"),
        (["ema"], {"RANK": "0"}, "under torchrun only the row gpu"),
    ],
)
def test_what_means_nothing_is_refused(
    arguments: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_operations_are_counted_as_the_papers_have_them(tmp_path: Path) -> None:
    """118.64 G multiplications and additions forward (Peebles and Xie, 2023, table 4), twice as many backward."""
    subject = SUBJECTS["dit-xl-2"]
    counted = count(subject.config(subject.write(tmp_path / "data"), 1, compiled=False), subject.num_tokens)
    assert counted.flops == pytest.approx(3 * 2 * 118.64e9, rel=0.01)
    assert counted.num_parameters == pytest.approx(750e6, rel=0.01)  # in diffusers' form: see configs/dit-xl-2.yaml


def test_the_networks_are_those_of_the_recipes() -> None:
    unet = ARCHITECTURES["stabilityai/stable-diffusion-2-base"][3]
    dit = ARCHITECTURES["facebook/DiT-XL-2-256"][3]
    assert SUBJECTS["sd2-unet"].args == unet and SUBJECTS["dit-xl-2"].args == dit


@pytest.mark.parametrize(
    ("device", "tflops"),
    [("NVIDIA H200", 989.5), ("NVIDIA GH200 480GB", 989.5), ("NVIDIA A100-SXM4-80GB", 312.0), ("Tesla T4", None)],
)
def test_a_known_device_has_a_named_peak(device: str, tflops: float | None) -> None:
    named = replace(LIMITS, device=device).named_flops
    assert named == (None if tflops is None else 1e12 * tflops)


def test_kernels_are_put_back_as_they_were() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    for deterministic in (True, False):
        with kernels(deterministic):
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            assert torch.backends.cudnn.benchmark is not deterministic
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before
