"""A long run on a large cluster, on a simulated clock: what saves, failures and restarts leave of its time.

Step by step, with the run's own rules: `CheckpointConfig.tiers_due` says what is saved where, `failures.decide` whether
the run goes on. Failures come as a Poisson process from a seed. A killed trainer goes on from the snapshot in memory, a
lost node from its neighbour's memory; if that neighbour is lost too before all are back, from storage.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.coordination.failures import Action, Failure, FailureConfig, decide
from orchestrator.messages.attempts import ExitKind, TrainerExit
from orchestrator.sections import CheckpointConfig

DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds."""

    step_s: float
    stall_s: float
    """For which a snapshot stops the training."""
    peer_s: float
    """From the snapshot until it lies in a neighbour's memory."""
    storage_s: float
    """From the snapshot until it is committed in storage."""
    in_place_s: float
    """From a trainer's death to its next step, with all agents alive."""
    replace_s: float
    """The same for the loss of a node."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Something fails."""

    at_s: float
    node: int
    whole_node: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the run."""

    goodput: float
    """Time of the steps that are in the end result, by wall time."""
    num_failures: int
    lost_steps: int
    from_storage: int
    """Restarts that found too little in the memory of the nodes."""


def draw_losses(per_1000_node_days: float, nodes: int, days: float, node_share: float, seed: int = 0) -> list[Loss]:
    """Args: node_share: of the failures, those that take the node."""
    dice, losses, at_s = random.Random(seed), [], 0.0
    mean_s = DAY_S * 1000 / (per_1000_node_days * nodes)
    while (at_s := at_s + dice.expovariate(1 / mean_s)) < days * DAY_S:
        losses.append(Loss(at_s=at_s, node=dice.randrange(nodes), whole_node=dice.random() < node_share))
    return losses


def simulate(losses: Sequence[Loss], days: float, costs: Costs, config: CheckpointConfig) -> Outcome:
    """Train for so many days.

    Raises:
        AssertionError: the run's rules gave it up.
    """
    run = _Run(losses, costs, config)
    while run.now_s < days * DAY_S:
        run.step()
    done = run.completed * costs.step_s
    return Outcome(
        goodput=done / run.now_s,
        num_failures=run.num_failures,
        lost_steps=run.lost_steps,
        from_storage=run.from_storage,
    )


class _Run:
    def __init__(self, losses: Sequence[Loss], costs: Costs, config: CheckpointConfig) -> None:
        self._losses = losses
        self._times = [loss.at_s for loss in losses]
        self._costs = costs
        self._config = config
        self._next = 0
        self._began = 0
        self._history: list[Failure] = []
        self._groups = 0
        self._held = 0
        self._stored = [(0, 0.0)]
        self._peers = [(0, 0.0)]
        self.now_s = 0.0
        self.completed = 0
        self.num_failures = self.lost_steps = self.from_storage = 0

    def step(self) -> None:
        """One step with its save, or the recovery from what fails in it."""
        tiers = self._config.tiers_due(self.completed + 1, 1 << 60)
        end_s = self.now_s + self._costs.step_s + (self._costs.stall_s if tiers else 0.0)
        if self._next < len(self._losses) and self._times[self._next] < end_s:
            self._recover()
            return
        self.now_s, self.completed = end_s, self.completed + 1
        if "peer" in tiers:
            self._peers = [*self._peers[-1:], (self.completed, end_s + self._costs.peer_s)]
        if "storage" in tiers:
            self._stored = [*self._stored[-3:], (self.completed, end_s + self._costs.storage_s)]
        if tiers:
            self._held = self.completed

    def _recover(self) -> None:
        """Go through the failures until the run trains again; one in the middle of a recovery begins it anew."""
        reached, lost = self.completed, []
        while self._next < len(self._losses) and (not lost or self._losses[self._next].at_s < self.now_s):
            lost.append(self._losses[self._next])
            self._next += 1
            whole = any(loss.whole_node for loss in lost)
            self.now_s = lost[-1].at_s + (self._costs.replace_s if whole else self._costs.in_place_s)
        self.num_failures += len(lost)
        self.completed = self._restored(lost)
        self.lost_steps += reached - self.completed
        self._judge(lost, reached)
        self._began = self.completed

    def _restored(self, lost: Sequence[Loss]) -> int:
        """The step that training goes on from."""
        nodes = sorted(loss.node for loss in lost if loss.whole_node)
        if not nodes:
            return self._held
        began_s = lost[0].at_s
        in_memory = max(step for step, at_s in self._peers if at_s <= began_s) if self._config.peer else 0
        neighbours = any(after - node == 1 for node, after in pairwise(nodes))
        stored = max(step for step, at_s in self._stored if at_s <= began_s)
        step = stored if neighbours else max(in_memory, stored)
        self.from_storage += step == stored and stored < in_memory
        self._held, self._peers, self._stored = step, [(step, 0.0)], [(stored, 0.0)]
        return step

    def _judge(self, lost: Sequence[Loss], reached: int) -> None:
        """Ask the run's own rules whether it goes on."""
        limits = FailureConfig()
        self._groups = self._groups + 1 if self.completed <= self._began else 0
        assert self._groups < limits.agents, f"gave up at step {reached}: groups of agents made no progress"
        if any(loss.whole_node for loss in lost):
            self._history = []  # of the coordinator that went with its group
            return
        end = TrainerExit(kind=ExitKind.KILLED, message="killed")
        self._history.append(Failure(rank=0, exit=end, restored_step=self._began, reached_step=reached))
        decision = decide(self._history, limits, quarantine=False)
        assert decision.action is Action.RESTART, decision.reason
        self.now_s += decision.delay_s


def expected_goodput(mean_s: float, interval_s: float, stall_s: float, lag_s: float, restart_s: float) -> float:
    """For Poisson failures and a fixed interval, with the work lost while a snapshot is not safe yet.

    Source: Daly 2006, eq. 20, solved for the share of useful time; `lag_s` adds to the work that a failure takes.
    """
    whole = mean_s * math.exp(restart_s / mean_s) * math.expm1((interval_s + stall_s) / mean_s)
    return interval_s / whole * math.exp(-lag_s / mean_s)
