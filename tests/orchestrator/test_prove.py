from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.catalog import quarantine
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import commit
from orchestrator.errors import RunNotFoundError, UnbrokenError
from orchestrator.prove import prove
from tests.orchestrator.checkpoint.shards import write_shard
from tests.orchestrator.checkpoint.states import SPECS, make_info, make_state, save
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec


def make_run(steps=(1, 2, 3), **changes) -> Store:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    open_or_create(store, {})
    for step in steps:
        save(store, make_state(step), step=step, **changes)
    return store


def flipped(step: int, name: str):
    state = make_state(step)
    state[name] = state[name].copy()
    state[name][-1, -1] ^= 128
    return state


def test_equal_runs_of_different_world_sizes_attempts_and_strategies():
    proof = prove(make_run(), make_run(steps=(2, 3, 4), attempt=9, world_size=2, strategy="ddp"))
    assert proof.equal
    assert (proof.num_checkpoints, proof.num_tensors, proof.num_replays) == (2, 2 * len(SPECS), 0)
    assert proof.last == Progress(3, 30)


def test_the_overall_fingerprint_tells_runs_apart():
    one, other = make_run(), make_run(steps=(1, 2))
    save(other, make_state(99), step=3)
    assert prove(one, one).fingerprint == prove(make_run(), one).fingerprint != prove(other, other).fingerprint


def test_the_first_difference_is_the_oldest_step_then_the_name():
    other = make_run(steps=(1,))
    save(other, flipped(2, "model/proj.bias"), step=2)
    save(other, flipped(3, "ema/main/proj.weight"), step=3)
    difference = prove(make_run(), other).first_difference
    assert (difference.progress, difference.name) == (Progress(2, 20), "model/proj.bias")
    assert str(difference).startswith("step 2, model/proj.bias: ") and difference.a != difference.b


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_one_bit_of_any_tensor_counts(spec):
    other = make_run(steps=())
    save(other, flipped(1, spec.name), step=1)
    assert prove(make_run(), other).first_difference.name == spec.name


def test_the_same_bytes_of_another_type_are_a_difference():
    one, other = make_run(steps=()), make_run(steps=())
    for store, dtype in ((one, "F32"), (other, "I32")):
        spec = TensorSpec(name="model/w", dtype=dtype, shape=(100,))
        chunk = Chunk(spec=spec, row_offset=0, num_rows=100, begin=0, end=400)
        receipt = write_shard(store, CheckpointRef(10, 1).shard(0, 1), [chunk], memoryview(bytes(range(100)) * 4), {})
        commit(store, [receipt], make_info(1, 1))
    assert prove(one, other).first_difference.name == "model/w"


@pytest.mark.parametrize(
    ("scalars", "name"),
    [
        ({"optimizer": {"step": 1}, "ema": {"main": {"num_updates": 2}}}, "scalars/ema/main/num_updates"),
        ({"optimizer": {"step": 1}}, "scalars/ema/main/num_updates"),
        ({"optimizer": {"step": 1.0}, "ema": {"main": {"num_updates": 1}}}, "scalars/optimizer/step"),
    ],
)
def test_scalars_of_the_state_count(scalars, name):
    assert prove(make_run(steps=(1,)), make_run(steps=(1,), scalars=scalars)).first_difference.name == name


def test_a_replay_that_differs_is_found_though_the_newest_attempts_agree():
    one, other = make_run(), make_run()
    save(one, make_state(3), step=3, attempt=2)
    assert prove(one, other).equal and prove(one, other).num_replays == 1
    save(one, flipped(2, "model/mask"), step=2, attempt=0)
    difference = prove(one, other).first_difference
    assert difference.name == "model/mask" and difference.runs == "run A, attempts 1 and 0"
    assert prove(other, one).first_difference.runs == "run B, attempts 1 and 0"


def test_of_two_attempts_the_newest_one_is_compared():
    one, other = make_run(), make_run()
    save(other, flipped(3, "model/mask"), step=3, attempt=2)
    difference = prove(one, other).first_difference
    assert difference.progress.step == 3 and difference.name == "model/mask"


def test_a_quarantined_checkpoint_is_no_evidence():
    one, other = make_run(), make_run(steps=(1, 2))
    bad = save(other, make_state(99), step=3)
    assert not prove(one, other).equal
    quarantine(other, bad.ref, "damaged", attempt=1)
    proof = prove(one, other)
    assert proof.equal and proof.num_checkpoints == 2


def test_an_unhealthy_checkpoint_is_no_evidence():
    other = make_run(steps=(1, 2))
    save(other, make_state(99), step=3, health={"ok": False, "reason": "loss is NaN"})
    proof = prove(make_run(), other)
    assert proof.equal and proof.num_checkpoints == 2


def test_the_same_samples_in_other_steps_are_not_the_same_progress():
    other = make_run(steps=())
    save(other, make_state(1), step=1, progress=Progress(2, 10))
    with pytest.raises(UnbrokenError, match="no stable checkpoint in common"):
        prove(make_run(), other)


def test_nothing_in_common_is_no_success():
    with pytest.raises(UnbrokenError, match="3 and 1"):
        prove(make_run(), make_run(steps=(4,)))


def test_a_url_without_a_run_is_named():
    with pytest.raises(RunNotFoundError):
        prove(make_run(), Store.open(f"memory://{uuid.uuid4().hex}"))
