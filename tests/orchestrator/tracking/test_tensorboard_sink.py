"""TensorBoard: what its reader shows, after kills."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.tracking.tensorboard_sink import TensorBoardSink
from tests.orchestrator.tracking.made_up import attempt, event, opened

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def shown(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps, as TensorBoard shows them: a session that starts at a step purges later ones of earlier files."""
    steps: dict[str, list[int]] = {}
    for path in sorted(folder.glob("events.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            found = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
            position += 16 + length
            if found.session_log.status == 1:
                steps = {tag: [step for step in old if step < found.step] for tag, old in steps.items()}
            for value in found.summary.value:
                steps.setdefault(value.tag, []).append(found.step)
    return steps


def test_every_step_is_shown_once_after_a_kill(tmp_path: Path) -> None:
    lines: list[str] = []
    introduction, folder = opened(tmp_path), tmp_path / "tensorboard"
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    first = TensorBoardSink(introduction, folder, lines.append)
    story = [*attempt(1, 0, 6), event("samples", step=6, path=str(tmp_path / "grid.png"), title="ema")]
    for one in story:
        first.take(one)
    first._flush()
    unmarked = list(attempt(1, 6, 9))[2:]
    for one in unmarked:
        first.take(one)
    first._writer.flush()  # written, and killed before that was marked
    second = TensorBoardSink(introduction, folder, lines.append)
    rest = [event("validation", step=9, metrics={"fid": 1.0}), event("samples", step=9, path="gone.png", title="ema")]
    for one in [*story, *unmarked, *attempt(2, 9, 12), *rest]:
        second.take(one)
    second.close()
    first._writer.close()
    steps = shown(folder)
    assert steps["train/loss"] == list(range(1, 13)) and steps["restart/attempt"] == [10]
    assert steps["validation/fid"] == [9] and steps["samples/ema"] == [6]
    assert len(lines) == 1 and "gone.png" in lines[0]
