"""Validation and grids: the same bits for every layout, and training does not notice them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import UNET, build_tiny, tiny_config
from trainers.data.guarded import GuardedSource
from trainers.evaluation.validation import validation_loss
from trainers.evaluation.weights import evaluated_with
from trainers.loop import train
from trainers.ports import Unsaved
from trainers.progress import Progress
from trainers.state import fingerprints

STEPS = 4
EVALUATION = {
    "validation": {"num_samples": 30, "every_steps": 2},
    "samples": {"every_steps": 3, "num_images": 11, "num_steps": 2, "weights": ["raw", "slow"], "guidance": 1.5},
}
OFF = {"validation": {"num_samples": 30, "every_steps": None}}
CONFIG = tiny_config(UNET, objective={"label_drop": 0.1})
BF16 = {**CONFIG, "train": {**CONFIG["train"], "precision": "bf16"}}


class Witness(Unsaved):
    """All ports at once: remembers the numbers of steps, of validations, and the pictures."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.validations: dict[int, dict[str, float]] = {}
        self.pictures: dict[tuple[int, str], bytes] = {}
        self.evaluated_at: list[int] = []
        self.parts = 0

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        self.steps.append(dict(metrics))

    def evaluating(self) -> None:
        self.parts += 1

    def validated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        self.validations[progress.step] = dict(metrics)

    def drew(self, progress: Progress, weights: str, png: bytes) -> None:
        self.pictures[progress.step, weights] = png

    def evaluated(self, progress: Progress, seconds: float) -> None:
        assert seconds > 0
        self.evaluated_at.append(progress.step)


def run(config: dict[str, Any]) -> dict[str, Any]:
    state, task = build_tiny(config)
    witness = Witness()
    train(state, task, witness, witness, witness)
    assert state.model.training
    state.generators.capture()
    return {
        "steps": witness.steps,
        "state": fingerprints(state),
        "validations": witness.validations,
        "pictures": witness.pictures,
        "evaluated": witness.evaluated_at,
        "parts": witness.parts,
        "members": (_members(task.source), _members(task.validation)),
    }


def _members(source: GuardedSource | None) -> set[int]:
    """The dataset indices that can be read through `source`."""
    assert source is not None
    read: set[int] = set()
    ours = source._source.read
    source._source.read = lambda indices, crops: (read.update(indices.tolist()), ours(indices, crops))[1]
    for begin in range(0, len(source), 4):  # a microbatch: more has no room in the trace
        source.read(np.arange(begin, min(begin + 4, len(source))))
    source._source.read = ours
    return read


def run_all(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run(config) for config in configs]


@pytest.fixture(scope="module")
def on_one_rank() -> list[dict[str, Any]]:
    """In float32 and in bfloat16, each with and without evaluation."""
    precisions = [{**config, **how} for config in (CONFIG, BF16) for how in (EVALUATION, OFF)]
    return run_ranks(1, run_all, precisions)[0]


@pytest.fixture
def reference(on_one_rank: list[dict[str, Any]]) -> dict[str, Any]:
    return on_one_rank[0]


def test_training_does_not_notice_it(reference: dict[str, Any], on_one_rank: list[dict[str, Any]]) -> None:
    without = on_one_rank[1]
    assert without["evaluated"] == [] and reference["evaluated"] == [2, 3, 4]
    assert without["steps"] == reference["steps"] and without["state"] == reference["state"]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(3, {"strategy": "fsdp"}), (2, {"strategy": "ddp"})],
)
def test_one_result_for_every_layout(reference: dict[str, Any], world_size: int, parallel: dict[str, Any]) -> None:
    found = run_ranks(world_size, run, {**CONFIG, **EVALUATION, "parallel": parallel})
    for rank, result in enumerate(found):
        for key in ("steps", "state", "validations", "evaluated"):
            assert result[key] == reference[key], key
        assert result["pictures"] == (reference["pictures"] if rank == 0 else {})
    # Dealt out: 8 microbatches (three weights at step 2 and 4) and 6 parts of a grid (two weights at step 3 and 4).
    assert found[0]["parts"] == 6 * -(-8 // world_size) + 4 * -(-6 // world_size)


def test_in_bfloat16(reference: dict[str, Any], on_one_rank: list[dict[str, Any]]) -> None:
    _, _, with_it, without = on_one_rank
    assert with_it["state"] == without["state"]
    for step, losses in with_it["validations"].items():
        # A tolerance, for bfloat16 has 8 bits.
        assert losses == pytest.approx(reference["validations"][step], rel=0.05)


def test_what_is_measured_and_drawn(reference: dict[str, Any]) -> None:
    # The profile `late` begins after step 2, as a copy of the weights.
    names = {"loss", "loss/ema/slow", "loss/ema/late"}
    assert [set(metrics) for metrics in reference["validations"].values()] == [names, names]
    second, last = reference["validations"].values()
    assert second["loss"] == second["loss/ema/late"] != second["loss/ema/slow"]
    assert len(set(last.values())) == 3 and set(second.values()).isdisjoint(last.values())
    assert sorted(reference["pictures"]) == [(3, "raw"), (3, "slow"), (4, "raw"), (4, "slow")]
    grids = {key: np.asarray(Image.open(io.BytesIO(png))) for key, png in reference["pictures"].items()}
    assert len({hashlib.sha256(grid.tobytes()).hexdigest() for grid in grids.values()}) == 4
    columns, rows = 10, 2  # a class each
    assert {grid.shape for grid in grids.values()} == {(rows * 68 + 4, columns * 68 + 4, 3)}


def _twice(config: dict[str, Any]) -> None:
    state, task = build_tiny(config)
    before = fingerprints(state)
    average = state.ema.tensors()["slow"] if "slow" in state.ema.tensors() else None
    assert average is not None
    for tensor in average.values():
        tensor.mul_(2.0)
    first = validation_loss(state, task, lambda: None)
    other = None
    for _ in range(2):  # whatever FSDP has gathered for the other weights is forgotten, both ways
        with evaluated_with(state, "slow"):
            again = validation_loss(state, task, lambda: None)
            assert other in (None, again) and again != first
            other = again
        assert validation_loss(state, task, lambda: None) == first
    with pytest.raises(RuntimeError, match="in the middle"), evaluated_with(state, "slow"):
        raise RuntimeError("in the middle")
    for tensor in average.values():
        tensor.mul_(0.5)
    assert fingerprints(state) == before and state.model.training


def test_weights_are_put_back_bitwise() -> None:
    run_ranks(2, _twice, {**CONFIG, **EVALUATION, "ema": {"slow": {"decay": 0.9, "start_step": 0}}})


def test_what_is_held_out_is_never_trained_on(reference: dict[str, Any], on_one_rank: list[dict[str, Any]]) -> None:
    trained_on, validated_on = reference["members"]
    assert len(trained_on) == 1797 - 30 and len(validated_on) == 30 and not trained_on & validated_on
    assert on_one_rank[1]["members"] == reference["members"]
