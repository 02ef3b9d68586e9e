"""What the user of `unbroken train` reads: one line an event, line by line, so that it can be logged and grepped."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from orchestrator.messages.attempts import Event

_STEP_INTERVAL_S = 2.0
"""Seconds between two lines of progress."""


class Screen:
    """Turns events into lines."""

    def __init__(self, num_steps: int, global_batch_size: int, write: Callable[[str], None]) -> None:
        self._num_steps = num_steps
        self._global_batch_size = global_batch_size
        self._write = write
        self._stable: int | None = None
        self._down_at: float | None = None
        self._last_trace = ""
        self._last_line_s = 0.0
        self._since: tuple[int, float] | None = None
        """Step and time from which samples/s is measured; starts anew with every attempt."""

    def show(self, event: Event) -> None:
        """Write the lines that `event` is worth, if any."""
        line = getattr(self, f"_{event.kind}", None)
        assert line is not None, event.kind
        line(event.time_s, **event.fields)

    def _attempt(
        self,
        at: float,
        *,
        attempt: int,
        restore: str | None,
        cause: str,
        world_size: int,
        tier: str = "storage",
        memory: int | None = None,
    ) -> None:
        start = f"from checkpoint {restore}" if restore else "from the beginning"
        start += " in the memory of the nodes" if tier == "peer" else ""
        start = f"from step {memory} in the agents' memory" if memory else start
        why = "" if cause == "start" else f", after: {cause}"
        self._write(f"attempt {attempt}: {world_size} worker{'s' * (world_size > 1)}, {start}{why}")

    def _trainer(self, at: float, *, rank: int, pid: int, agent_pid: int, attempt: int, node: str) -> None:
        where = f" on node {node[:8]}" if node else ""
        self._write(f"attempt {attempt}: rank {rank} trains in process {pid} (agent {agent_pid}){where}")

    def _reached(self, at: float, *, attempt: int, rank: int, stage: str) -> None:
        pass  # for those who measure where a restart spends its time

    def _training(self, at: float, *, attempt: int, step: int) -> None:
        self._since = (step, at)
        self._stable = step or self._stable
        self._write(f"attempt {attempt}: goes on from step {step}")

    def _step(self, at: float, *, attempt: int, step: int, metrics: dict[str, Any]) -> None:
        if self._down_at is not None:
            self._write(f"attempt {attempt}: first new step {at - self._down_at:.2f} s after the failure was seen")
            self._down_at = None
        # Negative if a clock was set back, or if another machine's is behind: then there would be no line for as long.
        if 0 <= at - self._last_line_s < _STEP_INTERVAL_S and step != self._num_steps:
            return
        self._last_line_s = at
        first, since = self._since or (step, at)
        rate = (step - first) / (at - since) if at > since else 0.0
        eta = str(timedelta(seconds=round((self._num_steps - step) / rate))) if rate else "?"
        stable = "none" if self._stable is None else f"step {self._stable}"
        loss = f"loss {metrics['loss']:.4f}" if "loss" in metrics else "left out"
        self._write(
            f"step {step}/{self._num_steps}  {loss}  {rate * self._global_batch_size:.0f} samples/s"
            f"  ETA {eta}  attempt {attempt}  newest stable checkpoint: {stable}"
        )

    def _saved(self, at: float, *, step: int, attempt: int, checkpoint: str, bytes: int, tier: str = "storage") -> None:
        self._stable = step

    def _save_failed(self, at: float, *, step: int, error: str, tier: str = "storage") -> None:
        place = "" if tier == "storage" else " in the memory of the nodes"
        self._write(f"checkpoint of step {step}{place} failed, training goes on without it: {error}")

    def _validation(self, at: float, *, attempt: int, step: int, metrics: dict[str, Any]) -> None:
        # The record has None where a number was not finite.
        values = "  ".join(f"{name} {float('nan') if value is None else value:.4f}" for name, value in metrics.items())
        self._write(f"step {step}: validation  {values}")

    def _samples(self, at: float, *, attempt: int, step: int, title: str, path: str) -> None:
        self._write(f"step {step}: samples of the weights {title}: {path}")

    def _samples_lost(self, at: float, *, attempt: int, step: int, title: str, error: str) -> None:
        self._write(f"step {step}: samples of the weights {title} could not be stored: {error}")

    def _evaluated(self, at: float, *, attempt: int, step: int, seconds: float) -> None:
        pass

    def _peers_lost(self, at: float, *, error: str) -> None:
        self._write(f"the memory of the nodes is not used: {error}")

    def _peers(self, at: float, *, num_nodes: int) -> None:
        if num_nodes == 1:
            self._write("warning: with one node, checkpoints in memory survive the death of agents, not of the node")

    def _save_delayed(self, at: float, *, rank: int, step: int, error: str) -> None:
        self._write(f"checkpoint of step {step}: rank {rank} tries again: {error}")

    def _save_skipped(self, at: float, *, step: int) -> None:
        self._write(f"no checkpoint of step {step}: the one before is still being stored")

    def _down(self, at: float, *, rank: int, kind: str, message: str) -> None:
        self._down_at = at

    def _failure(self, at: float, *, kind: str, reason: str, action: str, details: str, **where: Any) -> None:
        what = reason.splitlines()[0]  # the rest of a bug's three lines is told at the end
        self._write(f"attempt {where['attempt']}: stopped after step {where['step']}, {kind}: {what}; {action}")
        if details and kind in ("error", "start") and details != self._last_trace:
            self._last_trace = details  # once, however often it fails like this
            self._write(details.rstrip())

    def _bad_step(self, at: float, *, attempt: int, step: int, numbers: str) -> None:
        self._write(f"step {step} is bad and makes no update: {numbers}")

    def _broken_samples(self, at: float, *, attempt: int, step: int, samples: list[str]) -> None:
        first = samples[0].removesuffix(", or set data.on_broken=skip")  # which is why we are here
        self._write(f"step {step}: broken samples are replaced, {len(samples)} more, such as: {first}")

    def _diverged(self, at: float, *, attempt: int, reason: str, skip: list[int], rollback: int) -> None:
        self._write(f"training diverged: {reason}; rollback {rollback}: steps {skip[0]} to {skip[1]} are left out")

    def _left_out(self, at: float, *, attempt: int, step: int, samples: list[int], reason: str) -> None:
        self._write(f"from step {step} on {len(samples)} samples are left out: {reason}")

    def _replay_differs(self, at: float, *, attempt: int, step: int, ranks: list[int], message: str) -> None:
        self._write(f"warning: {message}")

    def _corrupted(self, at: float, *, attempt: int, step: int, since: int, ranks: list[int], reason: str) -> None:
        who = f"node of rank {ranks[0]}" if len(ranks) == 1 else f"nodes of ranks {', '.join(map(str, ranks))}"
        self._write(f"warning: what was made from step {since} on may be wrong; if it happens again, replace the {who}")

    def _agent_lost(self, at: float, *, rank: int, why: str) -> None:
        self._down_at = at
        self._write(f"rank {rank}: the agent or its node is gone ({why}); Ray Train replaces it")

    def _group_lost(self, at: float) -> None:
        self._down_at = self._down_at or at

    def _placing(self, at: float, *, num_workers: int) -> None:
        pass  # as `_reached`

    def _placed(self, at: float) -> None:
        pass

    def _hang(self, at: float, *, attempt: int, ranks: list[int], why: str, where: list[str]) -> None:
        self._down_at = at
        stuck = "; ".join(f"rank {rank} is stuck, {text}" for rank, text in zip(ranks, where, strict=True))
        self._write(f"attempt {attempt}: {why}: {stuck or 'all ranks wait for each other'}; see stacks/ in the run")

    def _stacks_lost(self, at: float, *, error: str) -> None:
        self._write(f"the stacks of the hang could not be stored: {error}")

    def _straggler(self, at: float, *, attempt: int, rank: int, step_s: float, others_s: float) -> None:
        self._write(
            f"rank {rank} is slow: its own work takes {step_s:.3f} s a step, that of the others {others_s:.3f} s"
        )

    def _halting(self, at: float, *, purpose: str, reason: str) -> None:
        when = "at the next checkpoint" if purpose == "grow" else "after the step under way"
        self._write(f"{reason}: saving and stopping {when}")

    def _regroup(self, at: float, *, reason: str, kept: str) -> None:
        self._down_at = at
        self._write(f"{reason}: {kept}; Ray Train places the workers anew")

    def _controller_lost(self, at: float, *, reason: str) -> None:
        self._write(f"{reason}; starting Ray Train again")

    def _nodes_unseen(self, at: float, *, error: str) -> None:
        self._write(f"drained nodes, and room for more workers, are not seen now; looking again: {error}")

    def _started(self, at: float, **facts: Any) -> None:
        self._write("starting: first Ray and the workers")  # which may take a minute on a busy machine

    def _snapshot(self, at: float, *, attempt: int, step: int, stall_s: float) -> None:
        pass  # for the account of goodput

    def _cadence(self, at: float, *, every_steps: int, arithmetic: str) -> None:
        self._write(f"a checkpoint every {every_steps} steps from now on: {arithmetic}")

    def _past_unread(self, at: float, *, error: str) -> None:
        self._write(f"replayed steps are not compared with the record, it cannot be read: {error}")

    def _record_failed(self, at: float, *, error: str) -> None:
        self._write(f"the run's record cannot be written now and is held in memory, training goes on: {error}")

    def _record_resumed(self, at: float, *, dropped: int) -> None:
        self._write(f"the run's record is written again{f'; {dropped} rows are lost' if dropped else ', with no gap'}")

    def _store(self, at: float, *, kind: str, conditional_create: bool, warning: str | None) -> None:
        if warning is not None:
            self._write(f"warning: {warning}")

    def _storage_trouble(self, at: float, *, message: str, retry_s: float) -> None:
        self._write(f"{message}; trying again in {retry_s:.1f} s")

    def _quarantined(self, at: float, *, checkpoint: str, reason: str) -> None:
        self._write(f"checkpoint {checkpoint} is quarantined: {reason}; the next older one is taken")

    def _tracking(self, at: float, *, message: str) -> None:
        self._write(message)

    def _interrupted(self, at: float, *, kept: str) -> None:
        self._write(f"interrupted{': ' * bool(kept)}{kept}; the same command goes on from the newest stable checkpoint")

    def _pruned(self, at: float, *, checkpoint: str, reason: str) -> None:
        self._write(f"checkpoint {checkpoint} is removed: {reason}")

    def _prune_failed(self, at: float, *, error: str) -> None:
        self._write(f"old checkpoints are not removed this time, training goes on: {error}")

    def _already_finished(self, at: float, *, step: int, checkpoint: str) -> None:
        self._write(f"finished: step {step} of {self._num_steps} is in checkpoint {checkpoint}; nothing to do")

    def _outcome(self, at: float, *, ending: str, message: str, attempt: int = 0) -> None:
        if ending == "finished":
            self._write(f"finished: {message}")


def stdout_writer(line: str) -> None:
    """One line with the time of day, at once. A reader that is gone, or a full disk, is no reason to train no more."""
    with suppress(OSError):
        print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
