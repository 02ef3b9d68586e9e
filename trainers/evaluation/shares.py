"""Work that is cut into parts, and dealt out to the ranks."""

from __future__ import annotations

from collections.abc import Iterator

from trainers.reduction import Topology


def shares(num_parts: int, topology: Topology) -> Iterator[tuple[int, bool]]:
    """The parts that this rank works on, in as many rounds as every other rank.

    Yields:
        The part, and whether its result counts: a rank that has nothing left to do repeats the last part, because the
        others need it in the collectives of a sharded model.
    """
    for first in range(0, num_parts, topology.world_size):
        part = first + topology.rank
        yield min(part, num_parts - 1), part < num_parts
