from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import trainers.step
from tests.trainers.distributed import run_ranks
from tests.trainers.test_integrity import caught, flip
from tests.trainers.tiny import build_tiny, tiny_config, train_tiny
from trainers.exclusions import Exclusions
from trainers.progress import Progress
from trainers.reduction import InvariantReduction
from trainers.step import train_step

LAYOUTS = [{"strategy": "ddp"}, {"strategy": "hsdp", "shard_size": 2, "accumulation": "sharded"}]


def recomputed_on_four_ranks() -> list[Any]:
    """Of six microbatches two a rank, and none for the last; or one for each, and then two more."""
    found: list[Any] = []
    plain = train_tiny(tiny_config(), 2)
    for parallel in LAYOUTS:
        found.append(plain == train_tiny(tiny_config(parallel=parallel, integrity={"recompute_every": 1}), 2))
    _always_wrong(rank=1)
    state, task = build_tiny(tiny_config(parallel={"strategy": "ddp"}, integrity={"recompute_every": 2}))
    with caught(found):
        train_step(state, task)
        train_step(state, task)
    state, task = build_tiny(tiny_config(parallel={"strategy": "ddp"}, integrity={"recompute_every": 2}))
    state.progress, state.exclusions = Progress(3, 72), Exclusions(steps=((2, 2),))
    with caught(found):
        train_step(state, task)
    trainers.step.sample_losses = sample_losses
    _wrong_in_one_rehearsal(rank=1)
    state, task = build_tiny(tiny_config(integrity={"recompute_every": 1}))
    with caught(found):
        train_step(state, task)
    return found


def _always_wrong(rank: int) -> None:
    """A processor that has a wrong bit in every loss."""
    if dist.get_rank() == rank:
        trainers.step.sample_losses = lambda *arguments: sample_losses(*arguments) * (1 + 2**-20)


def _wrong_in_one_rehearsal(rank: int) -> None:
    """A bit of a gradient that is made for another rank, once."""
    left = [rank]

    def add_own(self: InvariantReduction, leaf: torch.Tensor) -> None:
        if [dist.get_rank()] == left and self._rounds.shift is not None:
            flip(leaf, bit=0)
            left.clear()
        real(self, leaf)

    real, InvariantReduction._add_own = InvariantReduction._add_own, add_own


sample_losses = trainers.step.sample_losses


def test_gradients_are_the_same_on_other_ranks_unless_one_computes_wrongly() -> None:
    results = run_ranks(4, recomputed_on_four_ranks)
    assert all(result == results[0] for result in results)
    *same, always, skipped, once = results[0]
    assert same == [True] * len(LAYOUTS), "making gradients twice changes nothing"
    assert always == (
        (1,),
        0,
        "gradients of step 2 were made twice and have other bits: microbatch 2 on rank 0 and rank 1; microbatch 3 on"
        " rank 0 and rank 1; microbatch 4 on rank 1 and rank 2; microbatch 5 on rank 1 and rank 2; alike in step 0: the"
        " processor or memory of rank 1 is faulty, or the training is not deterministic",
    )
    assert skipped[1] == 0 and "alike in step 0:" in skipped[2], "step 2 passed without training, so nobody compared"
    assert once[:2] == ((1, 2), 0)
    assert "other bits: microbatch 4 on rank 1 and rank 2; alike" in once[2] and "rank 1 or 2 is faulty" in once[2]
