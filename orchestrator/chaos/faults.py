"""Which faults a drill causes, and when: drawn once from a seed, before anything starts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from trainers.errors import ConfigError


class FaultKind(StrEnum):
    """What is done to the run, from outside of its program, but for `nan`."""

    KILL_WORKER = "kill-worker"
    """SIGKILL to the trainer of a rank."""
    KILL_AGENT = "kill-agent"
    """SIGKILL to the Ray Train worker of a rank, which takes its trainer and its snapshots with it."""
    KILL_NODE = "kill-node"
    """SIGKILL to everything of Ray on the node of a rank at once; another node takes its place."""
    HANG = "hang"
    """SIGSTOP to the trainer of a rank."""
    PARTITION = "partition"
    """The network of a rank's node is cut off; after a while it heals."""
    SLOW_STORE = "slow-store"
    """Every answer of the store is held back for a while."""
    CORRUPT_CHECKPOINT = "corrupt-checkpoint"
    """Everything is killed, one bit of the newest stable checkpoint is turned over, the same command is run again."""
    NAN = "nan"
    """A sample of one step has noise that is not a number: a property of the data, so in the undisturbed run too."""
    DRAIN = "drain"
    """Ray is told that the node of a rank will be taken away; when the run has left it, it is."""
    KILL_DRIVER = "kill-driver"
    """SIGKILL to the driver; then the same command is run again."""
    RESIZE = "resize"
    """Nodes are lost for good, or added, until there are as many as for another number of workers."""


NODE_KINDS = frozenset({FaultKind.KILL_NODE, FaultKind.DRAIN, FaultKind.PARTITION, FaultKind.RESIZE})
"""They need several nodes."""

NAN_POSITIONS = "UNBROKEN_DRILL_NAN_POSITIONS"
"""Environment variable of the nodes: which samples `nan` has made, as positions in the run, separated by commas."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, as planned."""

    kind: FaultKind
    step: int
    """It happens when this step is complete, or as soon after as the fault before is over; `nan`: in this step."""
    rank: int
    """Whose process or node it happens to; of `resize`, which number of workers; else of no meaning."""
    moment: float = 0.0
    """How far into the next step, 0 <= moment < 1."""


def draw(kinds: Sequence[FaultKind], count: int, seed: int, num_steps: int, num_ranks: int) -> list[Fault]:
    """A schedule: equal arguments give equal faults, on any machine.

    Each kind comes equally often, to one. The steps are uniform and different, which is what the arrivals of a Poisson
    process look like once their number is known. The last fifth of the run is left free to recover in.

    Raises:
        ConfigError: the run is too short for so many faults.
    """
    last = num_steps * 4 // 5
    if last < 2 * count + 1:
        least = -(-5 * (2 * count + 1) // 4)
        raise ConfigError(
            f"train.num_steps={num_steps} is too short for {count} faults; give at least {least}, or fewer faults with"
            " --count"
        )
    source = random.Random(seed)
    rounds, rest = divmod(count, len(kinds))
    drawn = [*kinds] * rounds + source.sample(list(kinds), rest)
    source.shuffle(drawn)
    steps = sorted(source.sample(range(2, last + 1), count))
    return [
        Fault(kind=kind, step=step, rank=source.randrange(num_ranks), moment=source.random())
        for kind, step in zip(drawn, steps, strict=True)
    ]


def steps_needed(faults: Sequence[Fault], spare: int, node_steps: int) -> int:
    """About how many steps it takes until all of them have been caused, if the run goes on while nodes are replaced.

    Args:
        spare: nodes that may be missing when another one is to be lost.
        node_steps: steps that are made until a lost node is replaced and has joined.
    """
    at, back_at = 0, [0]
    for fault in faults:
        at = max(at, fault.step)
        if fault.kind in NODE_KINDS:
            allowed = 0 if fault.kind is FaultKind.RESIZE else spare
            at = max(at, sorted(back_at, reverse=True)[allowed] if allowed < len(back_at) else 0)
            back_at.append(at + node_steps)
        at += 1  # recovered from when there is a new step
    return at


def poisoned(faults: Sequence[Fault], seed: int, global_batch_size: int) -> list[int]:
    """Position in the run of the sample that each `nan` makes bad: one in the batch of its step."""
    source = random.Random(f"poison {seed}")
    steps = [fault.step for fault in faults if fault.kind is FaultKind.NAN]
    return [(step - 1) * global_batch_size + source.randrange(global_batch_size) for step in steps]
