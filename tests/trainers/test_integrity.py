from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.trainers.distributed import run_ranks
from tests.trainers.test_loop import Recorder
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError, CorruptionError
from trainers.integrity import IntegrityConfig, ReplicaCheck, digest, odd_ones_out
from trainers.loop import train
from trainers.ports import Directive
from trainers.progress import Progress
from trainers.state import TrainState
from trainers.step import train_step


def flip(tensor: torch.Tensor, bit: int, element: int = 3) -> None:
    """Turn over one bit in the memory of `tensor`, as nothing that computes would."""
    words = tensor.detach().numpy().reshape(-1).view(f"u{tensor.element_size()}")
    words[element] ^= words.dtype.type(1 << bit)


def test_every_single_bit_that_turns_over_changes_the_digest_and_back() -> None:
    random = np.random.default_rng(0)
    tensors = [torch.from_numpy(random.standard_normal(shape, np.float32)) for shape in ((64, 3, 3), (7,), ())]
    tensors += [tensors[0].double(), tensors[0].bfloat16().view(torch.int16), torch.arange(33, dtype=torch.uint8)]
    clean = digest(tensors).item()
    for _ in range(500):
        tensor = tensors[random.integers(len(tensors))]
        where = int(random.integers(8 * tensor.element_size())), int(random.integers(tensor.numel()))
        flip(tensor, *where)
        assert digest(tensors).item() != clean, (tensor.dtype, where)
        flip(tensor, *where)
        assert digest(tensors).item() == clean


@pytest.mark.parametrize(
    ("digests", "expected"),
    [
        ([[[1, 2]], [[1, 2]]], ((), (), True)),
        ([[[1, 2]], [[1, 3]]], ((0, 1), (1,), False)),
        ([[[1, 2]], [[1, 2]], [[5, 2]]], ((2,), (0,), True)),
        ([[[1, 2]], [[4, 2]], [[5, 2]]], ((0, 1, 2), (0,), False)),
        ([[[1, 2]], [[1, 2]], [[5, 3]], [[5, 2]]], ((0, 1, 2, 3), (0, 1), False)),
        # Two replicas of two shards, then three: shard 1 of the last one.
        ([[[1], [7]], [[1], [8]]], ((1, 3), (0,), False)),
        ([[[1], [7]], [[1], [7]], [[1], [8]]], ((5,), (0,), True)),
    ],
)
def test_who_is_outvoted(digests: list[list[list[int]]], expected: tuple[Any, ...]) -> None:
    assert odd_ones_out(digests) == expected


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"integrity": {"replicas_every": 0}}, "replicas_every=0 must be at least 1, or null for never"),
        ({"integrity": {"recompute_every": -1}}, "recompute_every=-1 must be at least 1, or null for never"),
        (
            {"integrity": {"recompute_every": 200}, "parallel": {"reduction": "fast"}},
            "integrity.recompute_every=200 needs parallel.reduction=invariant; fast hands over no gradient",
        ),
    ],
)
def test_what_can_not_be_is_refused(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        decode(TrainerConfig, tiny_config(**sections))


def small(**sections: Any) -> dict[str, Any]:
    """One microbatch a rank."""
    return tiny_config(train={"global_batch_size": 16}, **sections)


@pytest.mark.parametrize(("num_replicas", "every"), [(1, 50), (2, None)])
def test_without_replicas_and_switched_off_nothing_is_looked_at(num_replicas: int, every: int | None) -> None:
    state: Any = SimpleNamespace(topology=SimpleNamespace(num_replicas=num_replicas), progress=Progress(1, 24))
    check = ReplicaCheck(IntegrityConfig(replicas_every=every))
    check.compare(state)  # it has no tensors
    assert check.is_due(50) == (every == 50) and not check.is_due(51)


class Flipping(Recorder):
    """Turns over a bit of one rank's weights after a step."""

    def __init__(self, rank: int, step: int, bit: int, save_at: int = 0) -> None:
        super().__init__(save_at)
        self._where = rank, step, bit
        self._state: TrainState

    def restore(self, state: TrainState) -> None:
        self._state = state

    def poll(self, progress: Progress) -> Directive:
        directive = super().poll(progress)
        rank, step, bit = self._where
        if (dist.get_rank(), progress.step) == (rank, step) and not directive.save:
            flip(self._state.parameters[0].local, bit)
        return directive


@contextmanager
def caught(found: list[Any]) -> Iterator[None]:
    try:
        yield
    except CorruptionError as error:
        found.append((error.ranks, error.alike_step, str(error)))
    else:
        found.append(None)


def on_four_ranks() -> list[Any]:
    """Every case in one group of processes; what each rank finds."""
    found: list[Any] = []
    for reduction, num_steps in (("fast", 1), ("invariant", 3)):
        state, task = build_tiny(small(parallel={"strategy": "ddp", "reduction": reduction}))
        with caught(found):
            for _ in range(num_steps):
                train_step(state, task)
                task.replicas.compare(state)
    assert state.progress.step == 3
    parts = {local.spec.name.rsplit("/", 1)[0]: local.tensor for local in state.tensors() if local.tensor.numel() > 3}
    assert parts.keys() == {"model", "optimizer/exp_avg", "optimizer/exp_avg_sq", "ema/slow", "ema/late", "rng"}
    for name in sorted(parts.keys() - {"rng"}):
        for _ in range(2):  # and back again
            if dist.get_rank() == 2:
                flip(parts[name], bit=0)
            with caught(found):
                task.replicas.compare(state)
    state, task = build_tiny(small(parallel={"strategy": "hsdp", "shard_size": 2}))
    if dist.get_rank() == 3:
        flip(next(p.local for p in state.parameters if p.local.numel() > 3), bit=7)
    with caught(found):
        task.replicas.compare(state)
    every = {"parallel": {"strategy": "ddp"}, "integrity": {"replicas_every": 3}}
    for ports in (Flipping(1, 1, bit=0), Flipping(1, 1, bit=0, save_at=2), Flipping(1, 1, bit=30)):
        state, task = build_tiny({**small(**every), "ema": {}})
        with caught(found):
            train(state, task, ports, ports, ports)
        found.append([call for call in ports.calls if call != "wait"])
    return found


def test_what_one_rank_holds_and_its_replicas_do_not_is_named_by_all() -> None:
    results = run_ranks(4, on_four_ranks)
    assert all(result == results[0] for result in results)
    assert results[0][:2] == [None, None], "no false alarm"
    flips = results[0][2:]
    names = ["ema late", "ema slow", "weights", "optimizer exp_avg", "optimizer exp_avg_sq"]
    for name, (ranks, alike_step, text) in zip(names, flips[:10:2], strict=True):
        assert (ranks, alike_step) == ((2,), 3)
        assert text == (
            f"rank 2 differs from its replicas in {name}, found after step 3, alike after step 3: a memory or a"
            " processor is faulty, or the machines are not of one kind"
        )
    assert flips[1:10:2] == [None] * 5
    hsdp, at_check, steps, at_save, saved, bad, stepped = flips[10:]
    assert hsdp[:2] == ((1, 3), 0)
    assert hsdp[2].startswith("ranks 1, 3 differ from each other, with no majority to say which is right, in weights")
    assert "as it was loaded" in hsdp[2]
    assert (at_check[:2], steps) == (((1,), 0), [1, 2, 3]) and "after step 3, alike after step 0" in at_check[2]
    assert (at_save[:2], saved) == (((1,), 0), [1, 2]), "found at the save of step 2, which is not made"
    assert (bad[:2], stepped) == (((1,), 0), [1]), "its loss is not finite: no step is taken for bad"
