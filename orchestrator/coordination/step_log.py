"""What is reported of each step: its numbers, whether it is bad, whether it differs from when it was first made."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.coordination.past import PastReader
from orchestrator.coordination.replay import ReplayCheck
from orchestrator.messages.attempts import Stepped
from trainers.progress import Progress


class StepLog:
    """One for each coordinator; fed by it."""

    def __init__(self, past: PastReader, event: Callable[..., None]) -> None:
        """
        Args:
            past: reads how steps were made before this group of agents.
            event: reports; called with the event's kind and its fields.
        """
        self._past: PastReader | None = past
        self._event = event
        self._replay = ReplayCheck()
        self._attempt = 0
        self._broken: set[str] = set()  # each is named once
        self.reached = Progress()
        """After the last step that is complete."""

    def begin_attempt(self, attempt: int, progress: Progress, changed_from: int | None) -> None:
        """Args: progress: where it begins; changed_from: from this step on, other numbers than before are right."""
        self._attempt, self.reached = attempt, progress
        self._replay.begin_attempt(changed_from)

    def take(self, stepped: Stepped) -> str | None:
        """Report a step. Returns how it differs from an earlier time that it was made, if it does."""
        step, metrics = stepped.progress.step, dict(stepped.metrics)
        self.reached = stepped.progress
        self._event("step", attempt=self._attempt, step=step, metrics=metrics)
        if "skipped" in metrics and "loss" in metrics:
            numbers = f"loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}"
            self._event("bad_step", attempt=self._attempt, step=step, numbers=numbers)
        if new := sorted(set(stepped.broken) - self._broken):
            self._broken.update(new)
            self._event("broken_samples", attempt=self._attempt, step=step, samples=new)
        late = None
        if self._past is not None and (past := self._past.past) is not None:
            late, self._past = self._replay.learn(past.steps), None
        difference = self._replay.check(step, metrics, stepped.losses, stepped.ranks) or late
        if difference is None:
            return None
        ranks, message = list(difference.ranks), difference.message
        self._event("replay_differs", attempt=self._attempt, step=difference.step, ranks=ranks, message=message)
        return message
