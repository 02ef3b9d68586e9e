"""Whether the ranks that hold the same rows of the state still hold the same bits.

Replicas begin alike and all take the same update, so they stay alike: where they do not, a bit has turned over in
somebody's memory, or a processor has computed an update wrongly. What one rank's wrong weights have done to its
gradients is in everybody's state by then. So a state is compared before it is saved, and no checkpoint is made of one
whose replicas differ; a bad step is compared first too, so that a fault is not taken for bad data.

What all replicas have alike is not found: a gradient that was wrong before it was exchanged, or a wrong bit that a
later update has rounded away. For the first see `trainers.recomputation`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trainers.errors import ConfigError, CorruptionError

if TYPE_CHECKING:
    from trainers.state import TrainState

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True, kw_only=True)
class IntegrityConfig:
    """How silent corruption is looked for: wrong bits that no device reports."""

    replicas_every: int | None = 50
    """Steps between two comparisons of what replicas hold (ddp, hsdp), >= 1; they are compared before every save, too.
    null: never, not even then."""
    recompute_every: int | None = None
    """Steps between two whose gradients are computed twice, on two ranks each, and compared, >= 1; takes 1 / this of
    the time: 200 is 0.5 %. null: never."""

    def __post_init__(self) -> None:
        for key in ("replicas_every", "recompute_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value} must be at least 1, or null for never")


class ReplicaCheck:
    """Compares replicas. One for each training process; fsdp has no replicas, and nothing to do here."""

    def __init__(self, config: IntegrityConfig) -> None:
        self._every = config.replicas_every
        self._alike_step: int | None = None

    def is_due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def compare(self, state: TrainState) -> None:
        """Compare what all ranks hold. Collective: all ranks; waits for the device once.

        Raises:
            CorruptionError: replicas differ. All ranks raise it, with the same words.
        """
        topology, step = state.topology, state.progress.step
        if self._every is None or topology.num_replicas == 1:
            return
        names, mine = digests(state)
        everybody = [torch.empty_like(mine) for _ in range(topology.world_size)]
        dist.all_gather(everybody, mine)
        by_rank = torch.stack(everybody).tolist()
        ranks, parts, outvoted = odd_ones_out([[by_rank[rank] for rank in replica] for replica in topology.replicas])
        if ranks:
            what, since = ", ".join(names[part] for part in parts), self._alike_step
            before = "as it was loaded" if since is None else f"alike after step {since}"
            raise CorruptionError(
                f"{_who(ranks, outvoted)} in {what}, found after step {step}, {before}:"
                " a memory or a processor is faulty, or the machines are not of one kind",
                ranks=ranks,
                alike_step=step if since is None else since,
            )
        self._alike_step = step


def digests(state: TrainState) -> tuple[list[str], torch.Tensor]:
    """What parts the state has, and a number for each, (parts,) int64, of the bits that this rank holds. Local."""
    parts = defaultdict[str, list[torch.Tensor]](list)
    for local in state.tensors():
        kind, name, *_ = local.spec.name.split("/")
        if kind != "rng":  # what was read at the last save, and derived anew in every step
            parts["weights" if kind == "model" else f"{kind} {name}"].append(local.tensor)
    return list(parts), torch.stack([digest(tensors) for tensors in parts.values()])


def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of the bits of `tensors`, taken as integers, () int64. Local, reads each once and copies none.

    Integers wrap around, each kind at its own size, so a single bit that turns over always changes the sum.
    """
    words = [tensor.detach().view(_WORDS[tensor.element_size()]) for tensor in tensors]
    # As wide as they are where that is enough to tell random changes: a sum in another type would copy them into it.
    sums = [word.sum(dtype=word.dtype if word.element_size() > 2 else torch.int64) for word in words]
    return torch.stack([total.to(torch.int64) for total in sums]).sum()


def odd_ones_out(digests: Sequence[Sequence[Sequence[int]]]) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Who differs from the other replicas.

    Args:
        digests: of each replica, of each of its shards, of each part of the state.

    Returns:
        The ranks that differ, the parts in which they do, and whether the others are the majority everywhere; without
        one, the ranks are all that hold these rows.
    """
    ranks, parts, outvoted = set[int](), set[int](), True
    num_shards = len(digests[0])
    for shard in range(num_shards):
        for part in range(len(digests[0][shard])):
            column = [replica[shard][part] for replica in digests]
            value, count = Counter(column).most_common(1)[0]
            if count == len(column):
                continue
            majority = 2 * count > len(column)
            outvoted = outvoted and majority
            parts.add(part)
            odd = (at for at, other in enumerate(column) if other != value or not majority)
            ranks.update(at * num_shards + shard for at in odd)
    return tuple(sorted(ranks)), tuple(sorted(parts)), outvoted


def _who(ranks: Sequence[int], outvoted: bool) -> str:
    listed = ", ".join(map(str, ranks))
    if not outvoted:
        return f"ranks {listed} differ from each other, with no majority to say which is right,"
    return f"rank {listed} differs from its replicas" if len(ranks) == 1 else f"ranks {listed} differ from the others"
