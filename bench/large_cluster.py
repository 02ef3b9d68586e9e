"""Goodput at 10,000 nodes, with failure rates that were published, on a simulated clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from bench.figure import Figure
from bench.simulation import DAY_S, Costs, draw_losses, expected_goodput, simulate
from orchestrator.sections import CheckpointConfig, Tier

_NODES, _RANKS_PER_NODE = 10_000, 8
_NODE_SHARE = 0.78
"""Of the interruptions those that were put down to hardware (Llama 3)."""
_RATES = {
    "Meta RSC-1": 6.50,  # arXiv 2410.21680
    "Meta RSC-2": 2.34,
    "Llama 3 405B": 1000 * 466 / (54 * 16384 / 8),  # 466 interruptions in 54 days of 16,384 GPUs, 8 a node
}
"""Failures in 1000 node-days."""
_COSTS = Costs(step_s=5.0, stall_s=0.05, peer_s=2.0, storage_s=30.0, in_place_s=5.0, replace_s=60.0)
"""Assumed, as nobody here has such a cluster. The two ways to recover get what the control path adds at this size."""
_GOAL = 0.97


def simulated_goodput(paths: Sequence[Sequence[tuple[float, float]]], days: float) -> list[Figure]:
    """For every rate: the goodput of the policy, by that of the best interval in hindsight on the same failures.

    The policy is Young's interval for the memory of the nodes, in whole steps, and an hour for storage.

    Args:
        paths: of what the control path does at a restart, milliseconds by number of ranks; extrapolated linearly.
    """
    control_s = sum(_beyond(points) for points in paths) / 1000
    costs = replace(_COSTS, in_place_s=_COSTS.in_place_s + control_s, replace_s=_COSTS.replace_s + control_s)
    figures = []
    for name, rate in _RATES.items():
        mean_s = DAY_S * 1000 / (rate * _NODES)
        losses = draw_losses(rate, _NODES, days, _NODE_SHARE)
        every = max(1, round(math.sqrt(2 * costs.stall_s * mean_s) / costs.step_s))
        ours = simulate(losses, days, costs, _tiers(every))
        tried = sorted({max(1, round(every * 2 ** (power / 2))) for power in range(-4, 5)})
        best = max(simulate(losses, days, costs, _tiers(k)).goodput for k in tried)
        interval_s = every * costs.step_s
        restart_s = _NODE_SHARE * costs.replace_s + (1 - _NODE_SHARE) * costs.in_place_s
        lag_s = _NODE_SHARE * costs.peer_s
        figures.append(
            Figure(
                name=f"simulated, {_NODES:,} nodes, {name}: goodput by that of the best interval",
                value=ours.goodput / best,
                goal=_GOAL,
                at_least=True,
                notes={
                    "goodput": ours.goodput,
                    "of the best interval": best,
                    "by Daly's formula": expected_goodput(mean_s, interval_s, costs.stall_s, lag_s, restart_s),
                    "minutes between failures": mean_s / 60,
                    "failures": ours.num_failures,
                    "steps lost": ours.lost_steps,
                    "restarts from storage": ours.from_storage,
                    "saved every (steps)": every,
                    "assumed (s)": vars(_COSTS),
                    "control path at this size (s)": control_s,
                },
            )
        )
    return figures


def _tiers(every: int) -> CheckpointConfig:
    storage = max(720, 2 * every)  # an hour of steps
    return CheckpointConfig(
        tiers=(Tier(url="peer://", every=every, keep=2), Tier(url="file:///runs", every=storage, keep=5))
    )


def _beyond(points: Sequence[tuple[float, float]]) -> float:
    """Milliseconds at the size of the simulated cluster, as the last point grows linearly."""
    ranks, milliseconds = points[-1]
    return milliseconds * max(1.0, _NODES * _RANKS_PER_NODE / ranks)
