"""A run at a glance, from storage alone: what it does now, how far it is, what it has cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from orchestrator.checkpoint import run_record
from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState, scan_checkpoints
from orchestrator.checkpoint.keys import CHECKPOINTS, EVENTS, METRICS, CheckpointRef
from orchestrator.checkpoint.run_record import RunRecord
from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Ending, Event
from orchestrator.tracking.goodput import Goodput, account
from orchestrator.tracking.losses import Losses
from orchestrator.tracking.record import Row, RowsReader, in_order, of_the_owner, one_row_a_step
from orchestrator.tracking.streaming import items_by_step

SILENCE_S = 90.0
"""Seconds after which a run that goes on would have given three signs of life."""
ENOUGH_ROWS = 20_000
"""Steps whose rows are read to say how a run does now; a long run has more, and they need not be read."""
_RATE_OVER_S = 60.0


class State(StrEnum):
    NOT_STARTED = "not started"
    STARTING = "starting"
    TRAINING = "training"
    RECOVERING = "recovering"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    ENDED = "ended"
    """It gave up, or was refused, superseded or left without storage: `why` says so."""
    SILENT = "no sign of life"

    @property
    def live(self) -> bool:
        return self in (State.STARTING, State.TRAINING, State.RECOVERING)


_NEXT = {
    "started": State.STARTING,
    "training": State.TRAINING,
    "down": State.RECOVERING,
    "agent_lost": State.RECOVERING,
    "hang": State.RECOVERING,
    "regroup": State.RECOVERING,
    "controller_lost": State.RECOVERING,
    "interrupted": State.INTERRUPTED,
    "already_finished": State.FINISHED,
}


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What `unbroken status` shows and `unbroken report` begins with."""

    url: str
    run: RunRecord
    state: State
    why: str
    """The reason of an end; empty otherwise."""
    since_s: float | None
    """Unix time of the last sign of life; None: there was none."""
    step: int
    num_steps: int
    global_batch_size: int
    world_size: int | None
    steps_per_s: float | None
    """Over the last minute of training."""
    metrics: Sequence[Row]
    """The newest ones, one row a step."""
    losses: Losses
    """Of all steps, or of those in `metrics`."""
    events: Sequence[Event]
    goodput: Goodput
    checkpoints: Sequence[CheckpointInfo]
    """The newest ones."""
    num_checkpoints: int
    newest_stable: CheckpointInfo | None
    damaged: Sequence[str]
    """Objects of the record that cannot be read as a whole."""

    @property
    def cadence(self) -> str | None:
        """How `checkpoint.every_steps: auto` came to its interval; None if it has not."""
        return next((event.fields["arithmetic"] for event in reversed(self.events) if event.kind == "cadence"), None)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step at the present rate, while it trains."""
        if self.state is not State.TRAINING or not self.steps_per_s:
            return None
        return max(0, self.num_steps - self.step) / self.steps_per_s


class RunView:
    """Looks at one run, again and again; what it has read it does not read anew."""

    def __init__(self, url: str, enough: int | None, most_checkpoints: int) -> None:
        """Args:
        enough: steps whose losses are wanted at least, the newest; None: all.
        most_checkpoints: to look into, the newest.

        Raises:
            RunNotFoundError: there is no run at `url`.
        """
        self.store = Store.reach(url)
        self._run = run_record.load(self.store)
        self._enough = enough
        self._most_checkpoints = most_checkpoints
        self._events = RowsReader(self.store, EVENTS)
        self._metrics = RowsReader(self.store, METRICS)

    def look(self, now_s: float | None = None) -> Overview:
        now_s = time.time() if now_s is None else now_s
        events = in_order(self._events.rows())
        metrics = one_row_a_step(self._metrics.rows(ENOUGH_ROWS if self._enough is None else self._enough))
        losses, damaged = self._losses(metrics)
        checkpoints, newest = self._checkpoints()
        refs = [ref for name in self.store.list(CHECKPOINTS) if (ref := CheckpointRef.parse(name))]
        present = Present(events, now_s)
        train = self._run.config.get("train", {})
        return Overview(
            url=self.store.url,
            run=self._run,
            state=present.state,
            why=present.why,
            since_s=present.last_s,
            step=present.step,
            num_steps=present.num_steps or train.get("num_steps", 0),
            global_batch_size=train.get("global_batch_size", 0),
            world_size=present.world_size,
            steps_per_s=_rate(metrics),
            metrics=metrics,
            losses=losses,
            events=events,
            goodput=account(events, max(now_s, present.last_s or now_s) if present.state.live else None),
            checkpoints=checkpoints,
            num_checkpoints=len(refs),
            newest_stable=newest,
            damaged=[*self._events.damaged, *damaged],
        )

    def _losses(self, newest: Sequence[Row]) -> tuple[Losses, list[str]]:
        """And what is damaged of the rows that they come from."""
        if self._enough is not None:
            return Losses((row["step"], row.get("loss")) for row in newest), self._metrics.damaged
        rows, items = items_by_step(self.store, lambda row: (row.get("loss"),))
        return Losses((step, loss) for step, _, loss in items), rows.damaged

    def _checkpoints(self) -> tuple[list[CheckpointInfo], CheckpointInfo | None]:
        """The newest ones, and the newest stable one, looking at no more of them than that takes."""
        found: list[CheckpointInfo] = []
        newest = None
        for info in scan_checkpoints(self.store):
            if newest is None and info.state is CheckpointState.STABLE:
                newest = info
            if len(found) < self._most_checkpoints:
                found.append(info)
            elif newest is not None:
                break
        return found, newest


class Present:
    """Where a run stands after its last event."""

    def __init__(self, events: Sequence[Event], now_s: float) -> None:
        self.state, self.why = State.NOT_STARTED, ""
        self.step = 0
        self.num_steps: int | None = None
        self.world_size: int | None = None
        self.last_s: float | None = None
        for event in of_the_owner(events):
            self._advance(event)
        if self.state.live and self.last_s is not None and now_s - self.last_s > SILENCE_S:
            self.state = State.SILENT

    def _advance(self, event: Event) -> None:
        # A run is finished since it was, not since somebody looked.
        if event.kind != "already_finished" or self.state is not State.FINISHED:
            self.last_s = event.time_s
        if event.kind in _NEXT:
            self.state, self.why = _NEXT[event.kind], ""
        elif event.kind == "attempt":
            self.world_size = event.fields["world_size"]
            if self.state is not State.STARTING:
                self.state = State.RECOVERING
        elif event.kind == "outcome":
            finished = event.fields["ending"] == Ending.FINISHED.value
            self.state = State.FINISHED if finished else State.ENDED
            self.why = "" if finished else f"{event.fields['ending']}: {event.fields['message']}"
        if event.kind in ("training", "step", "alive", "snapshot", "already_finished"):
            self.step = event.fields.get("step", self.step)
        if event.kind == "started":
            self.num_steps = event.fields["num_steps"]


def _rate(metrics: Sequence[Row]) -> float | None:
    """Steps a second over the last minute of the last attempt."""
    if not metrics:
        return None
    last = metrics[-1]
    first = last
    for row in reversed(metrics):
        if row["attempt"] != last["attempt"] or last["time_s"] - row["time_s"] > _RATE_OVER_S:
            break
        first = row
    seconds = last["time_s"] - first["time_s"]
    return (last["step"] - first["step"]) / seconds if seconds > 0 else None


def as_json(view: Overview) -> Mapping[str, Any]:
    """What a script wants to know."""
    goodput, newest = view.goodput, view.newest_stable
    rate = view.steps_per_s
    return {
        "url": view.url,
        "run_id": view.run.run_id,
        "state": str(view.state),
        "why": view.why,
        "last_sign_of_life": view.since_s,
        "step": view.step,
        "num_steps": view.num_steps,
        "workers": view.world_size,
        "steps_per_s": rate,
        "samples_per_s": None if rate is None else rate * view.global_batch_size,
        "eta_s": view.eta_s,
        "metrics": view.metrics[-1] if view.metrics else None,
        "attempts": goodput.attempts,
        "restarts": len(goodput.recoveries),
        "lost_steps": goodput.lost_steps,
        "goodput": goodput.share,
        "wall_s": goodput.wall_s,
        "seconds": {str(bucket): round(seconds, 3) for bucket, seconds in goodput.seconds.items()},
        "recoveries": [
            {
                "time": recovery.time_s,
                "cause": recovery.cause,
                "from_step": recovery.from_step,
                "to_step": recovery.to_step,
                "lost_steps": recovery.lost_steps,
                "seconds": round(recovery.seconds, 3),
            }
            for recovery in goodput.recoveries
        ],
        "newest_stable": str(newest.ref) if newest else None,
        "num_checkpoints": view.num_checkpoints,
        "cadence": view.cadence,
        "checkpoints": [
            {
                "checkpoint": str(info.ref),
                "state": str(info.state),
                "step": info.manifest.progress.step if info.manifest else None,
                "detail": info.detail,
            }
            for info in view.checkpoints
        ],
        "damaged": list(view.damaged),
    }
