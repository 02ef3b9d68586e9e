"""`make demo`, interrupted. That it goes through is what a person sees first, and takes minutes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orchestrator.test_train import ray_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

__all__ = ["ray_folder"]  # a fixture

ROOT = Path(__file__).parents[2]


def test_ctrl_c_leaves_the_last_word_to_the_command(ray_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(ROOT)}
    demo = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.demo"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    lines: list[str] = []
    for line in demo.stdout:
        lines.append(line)
        if " step " in line and len(lines) > 1:
            break
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
    with demo.stdout as rest:
        lines += rest
    text = "".join(lines)
    assert demo.wait() == 130, text
    assert "interrupted: SIGINT" in text and "Traceback" not in text and "$ unbroken sample" not in text
