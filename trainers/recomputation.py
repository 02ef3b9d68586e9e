"""Whether a step's gradients come out the same on other ranks.

A processor that computes wrongly makes wrong gradients, which all ranks then share: replicas stay alike, and nothing
fails. But no number depends on who computes it. So now and then a step's microbatches are computed on other ranks
first, each on the one before its own, and then where they belong; losses and gradients must have the same bits. What is
not made twice is the exchange of gradients, a few additions each.

Source of the idea: deterministic replay, as in "Gemini: A family of highly capable multimodal models", 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trainers.errors import CorruptionError
from trainers.exclusions import Exclusions
from trainers.integrity import IntegrityConfig
from trainers.parallel import drop_gradients
from trainers.reduction import Rounds

if TYPE_CHECKING:
    from trainers.state import TrainState

_SHOWN = 4
Made = tuple[torch.Tensor, list[str]]
"""Losses of the microbatches, (M,) float32, zero but for those of this rank; and the samples that were broken."""


class Recomputation:
    """Has gradients made twice. One for each training process."""

    def __init__(self, config: IntegrityConfig, rounds: Rounds, device: torch.device) -> None:
        self._every = config.recompute_every
        self._rounds = rounds
        self._device = device
        self._alike_step: int | None = None

    def gradients(self, state: TrainState, make: Callable[[], Made]) -> Made:
        """What `make` gives, which leaves the step's gradients in place; in some steps made on other ranks before.

        Collective: all ranks.

        Raises:
            CorruptionError: the numbers differ. All ranks raise it, with the same words.
        """
        step = state.progress.step + 1
        if self._every is None or step % self._every:
            return make()
        _, elsewhere = self._watched(make, shift=1)
        drop_gradients(state.parameters)
        made, here = self._watched(make, shift=None)
        table = torch.stack((*elsewhere, *here))
        dist.all_reduce(table)  # every place is zero on all ranks but one
        self._compare(step, table.tolist(), state.exclusions)
        return made

    def _watched(self, make: Callable[[], Made], shift: int | None) -> tuple[Made, tuple[torch.Tensor, torch.Tensor]]:
        """What `make` gives, and of each microbatch that this rank has made the bits of loss and gradient."""
        rounds = self._rounds
        bits = torch.zeros(rounds.num_microbatches, dtype=torch.int64, device=self._device)
        rounds.shift, rounds.bits = shift, bits
        try:
            made = make()
        finally:
            rounds.shift = rounds.bits = None
        return made, (made[0].view(torch.int32).to(torch.int64), bits)

    def _compare(self, step: int, table: Sequence[Sequence[int]], exclusions: Exclusions) -> None:
        columns = enumerate(zip(*table, strict=True))
        different = [index for index, (loss, bits, *here) in columns if [loss, bits] != here]
        if not different:
            self._alike_step = step
            return
        rounds, every = self._rounds, self._every
        assert every is not None
        pairs = [{rounds.rank_of(index), (rounds.rank_of(index) - 1) % rounds.world_size} for index in different]
        shown = "; ".join(
            f"microbatch {index} on rank {' and rank '.join(map(str, sorted(pair)))}"
            for index, pair in zip(different[:_SHOWN], pairs, strict=False)
        )
        more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        # Who is in every pair explains all of them.
        ranks = tuple(sorted(set.intersection(*pairs) or set.union(*pairs)))
        since = self._alike_step
        if since is None:  # no run gets past such a step without this comparison, unless it passes without training
            before = range((step - 1) // every * every, 0, -every)
            since = next((one for one in before if not exclusions.skips(one)), 0)
        raise CorruptionError(
            f"gradients of step {step} were made twice and have other bits: {shown}{more};"
            f" alike in step {since}: the processor or memory of rank {' or '.join(map(str, ranks))} is faulty, or the"
            " training is not deterministic",
            ranks=ranks,
            alike_step=since,
        )
