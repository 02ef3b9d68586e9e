"""What has failed in the life of a coordinator, what was decided, and what the run leaves out since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from orchestrator.checkpoint.catalog import CheckpointInfo
from orchestrator.coordination.failures import Action, Decision, Failure, classify, decide
from orchestrator.messages.attempts import Down, ExitKind, TrainerExit
from orchestrator.run_spec import RunSpec
from trainers.exclusions import Exclusions
from trainers.progress import Progress


class Casebook:
    """Judges one failed attempt after the other.

    It need not survive its process: what is left out stands in every later checkpoint, and from an older one training
    fails or diverges at the same step again, which leads to the same decision.
    """

    def __init__(
        self, spec: RunSpec, event: Callable[..., None], distrust: Callable[[int, int, Progress | None], None]
    ) -> None:
        """
        Args:
            event: reports; called with the event's kind and its fields.
            distrust: told from which step on what attempts up to which one have saved may be corrupted, and which
                snapshot is still to be saved.
        """
        self._spec = spec
        self._distrust = distrust
        self._event = event
        self._corrupted_attempt = 0
        self._history: list[Failure] = []
        self.exclusions = Exclusions()
        """What trainers are told to leave out, beside what stands in their checkpoint."""
        self.changed_from: int | None = None
        """From this step on the last decision changes the numbers; None: it changes none."""

    def learn(self, checkpoint: CheckpointInfo | None) -> Exclusions:
        """What is left out, now that training goes on from `checkpoint`, which may know of earlier lives."""
        manifest = checkpoint.manifest if checkpoint else None
        if manifest is not None and "exclusions" in manifest.scalars:
            self.exclusions = self.exclusions.merged(Exclusions.from_scalars(manifest.scalars["exclusions"]))
        return self.exclusions

    def hear(self, down: Down, reached_step: int) -> None:
        """Take one rank's end. That a state may be corrupted is not kept until all have ended: perhaps not all do."""
        end = down.exit
        if end.kind is not ExitKind.CORRUPTED or down.attempt == self._corrupted_attempt:
            return  # all ranks find the same, and have taken the same snapshots
        self._corrupted_attempt, since = down.attempt, end.alike_step + 1
        fields = {"since": since, "ranks": list(end.ranks), "reason": end.message}
        self._event("corrupted", attempt=down.attempt, step=reached_step, **fields)
        self._distrust(since, down.attempt, down.pending)

    def judge(self, attempt: int, exits: Mapping[int, TrainerExit], restored_step: int, reached_step: int) -> Decision:
        """Decide on the attempt that ended with `exits`, and report it."""
        rank, cause = classify(exits)
        # Without its trace, which decides nothing: a run of weeks may fail thousands of times.
        exit = replace(cause, details="")
        self._history.append(Failure(rank=rank, exit=exit, restored_step=restored_step, reached_step=reached_step))
        spec = self._spec
        decision = decide(self._history, spec.failures, spec.quarantine, len(self.exclusions.samples))
        self._event(
            "failure",
            attempt=attempt,
            rank=rank,
            kind=cause.kind.value,
            action=decision.action.value,
            reason=decision.reason,
            details=cause.details,
            step=reached_step,
            **_whereabouts(cause),
        )
        self.changed_from = None
        if cause.kind is ExitKind.CORRUPTED:
            # What was made since may be wrong in every replica: it is no measure of what is made now.
            self.changed_from = cause.alike_step + 1
        elif decision.action is Action.ROLL_BACK:
            assert cause.skip is not None
            self._leave_out(cause.skip[0], Exclusions(steps=(cause.skip,)))
            self._event(
                "diverged",
                attempt=attempt,
                reason=cause.message,
                skip=list(cause.skip),
                rollback=cause.num_rollbacks + 1,
            )
        elif decision.action is Action.LEAVE_OUT:
            assert cause.place is not None
            step, samples = cause.place.step, cause.place.samples
            self._leave_out(step, Exclusions(samples=tuple((step, index) for index in samples)))
            self._event("left_out", attempt=attempt, step=step, samples=list(samples), reason=decision.reason)
        return decision

    @property
    def last_kind(self) -> ExitKind:
        """The kind of the last failure."""
        return self._history[-1].kind

    def _leave_out(self, step: int, more: Exclusions) -> None:
        self.exclusions = self.exclusions.merged(more)
        self.changed_from = step


def _whereabouts(cause: TrainerExit) -> dict[str, Any]:
    place = cause.place
    return {
        "where": cause.frame,
        "microbatch": None if place is None else place.microbatch,
        "samples": [] if place is None else list(place.samples),
    }
