"""`checkpoint.every_steps: auto`: how often a run is saved, from what saves and failures cost. It decides no number.

Rank 0's coordinator measures and computes. A new interval travels with the end of a save and is taken up by all ranks
at the next one, when every rank has heard it; so all of them save after the same steps, without another collective.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.coordination.past import Past
from orchestrator.run_spec import RunSpec

FIRST_STEPS = 10
"""Interval until a save has been measured."""
_ASSUMED_S = 3 * 3600.0
"""Without any failure so far it is as if there had been one in this time."""
_KEPT = 0.1
"""Of that assumption, after the first failure: a run that fails every minute should not need dozens to believe it."""
_WINDOW = 9
_STEPS = 100
_WORTH_IT = 1.2
"""A new interval must differ by so much: measurements vary, and each change is a line for people."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What saves and failures cost, in seconds."""

    step_s: float
    """One step."""
    save_s: float
    """C: how much later training gets on for a save: it stands still, and its steps are slower while that is stored."""
    persist_s: float
    """L: from there until it is committed."""
    restart_s: float
    """R: from the start of an attempt to its first step."""
    trained_s: float
    """Time in training so far, over all attempts."""
    failures: int
    """In that time."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What follows."""

    steps: int
    arithmetic: str
    """How, for people."""


def best_interval(measured: Measured, most: int) -> Interval:
    """The interval of most availability: C + sqrt(2 (M + R) C + C^2), M the mean time between failures.

    No shorter than L: one save is in flight at a time. L costs work too, but the same at any interval.

    Args:
        most: steps, >= 1.

    Source: Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974, is its first
    order; the form for availability is from arXiv 2410.18124.
    """
    save_s, restart_s = measured.save_s, measured.restart_s
    assumed = _KEPT if measured.failures else 1
    between_s = (measured.trained_s + assumed * _ASSUMED_S) / (measured.failures + assumed)
    seconds = save_s + math.sqrt(2 * (between_s + restart_s) * save_s + save_s**2)
    wanted = max(1, round(max(seconds, measured.persist_s) / measured.step_s))
    steps = min(most, wanted)
    bound = ""
    if measured.persist_s > seconds:
        bound = f", raised to L={_s(measured.persist_s)}, which a save takes to be stored"
    if steps < wanted:
        bound += f", at most {most} steps"
    text = (
        f"C={_s(save_s)} a save, R={_s(restart_s)} a restart, M={_s(between_s)} between failures"
        f" ({measured.failures} in {_s(measured.trained_s)}, and {assumed} assumed in {_s(assumed * _ASSUMED_S)}):"
        f" C + sqrt(2 (M + R) C + C^2) = {_s(seconds)}{bound}; at {_s(measured.step_s)} a step: every {steps} steps"
    )
    return Interval(steps=steps, arithmetic=text)


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


@dataclass
class _Save:
    """The one that is not charged yet."""

    stall_s: float
    since: float
    """When training went on."""
    beside_s: list[float] = field(default_factory=list)
    """The steps done since."""
    stored: bool = False


class Cadence:
    """Measures, in the coordinator; told the time by its caller."""

    def __init__(self, spec: RunSpec, past: Callable[[], Past | None], event: Callable[..., None]) -> None:
        """
        Args:
            past: what was before this group of agents, once that is known.
            event: reports; called with the event's kind and its fields.
        """
        checkpoint = spec.checkpoint
        self._past = past
        self._event = event
        self._most = checkpoint.max_lag_steps // 2 if checkpoint.max_lag_steps else 10**9
        self._steps_s, self._quiet_s = (deque[float](maxlen=_STEPS) for _ in range(2))
        """All steps, and those beside which nothing was stored."""
        self._saves_s, self._persists_s, self._restarts_s = (deque[float](maxlen=_WINDOW) for _ in range(3))
        self._last: _Save | None = None
        self._trained_s = 0.0
        self._attempts = 0
        self._since = 0.0
        self._stepping = False
        self._paused_at: float | None = None
        self.every_steps = min(self._most, FIRST_STEPS) if checkpoint.automatic else None
        """Interval of saves; None: the config says it."""

    def begin_attempt(self, now: float) -> None:
        self._attempts += 1
        self._since, self._stepping, self._last = now, False, None

    def stepped(self, now: float) -> None:
        took_s, self._since = now - self._since, now
        if not self._stepping:
            self._restarts_s.append(took_s)
            self._stepping = True
            return
        self._trained_s += took_s
        self._steps_s.append(took_s)
        if self._last is None:
            self._quiet_s.append(took_s)
        else:
            self._last.beside_s.append(took_s)
            if self._last.stored:
                self._charge(self._last)

    def paused(self, stall_s: float, now: float) -> None:
        """Training goes on after a snapshot, for which it stood still so long."""
        if self._last is not None and self._last.stored:
            self._charge(self._last)
        self._trained_s += now - self._since
        self._since = now
        self._last = _Save(stall_s, now)

    def stored(self, now: float) -> None:
        """That snapshot is committed. What it has cost is known when the step under way is done."""
        if self._last is not None:
            self._last.stored = True
            self._persists_s.append(now - self._last.since)

    def _charge(self, save: _Save) -> None:
        """Its pause, and what the steps beside it took longer than others; and what follows for the interval."""
        self._last = None
        if not self._steps_s:
            return
        usual_s = statistics.median(self._quiet_s or self._steps_s)
        self._saves_s.append(save.stall_s + max(0.0, sum(took_s - usual_s for took_s in save.beside_s)))
        if self.every_steps is None:
            return
        found = best_interval(self._measured(usual_s), self._most)
        if max(found.steps, self.every_steps) >= _WORTH_IT * min(found.steps, self.every_steps):
            self.every_steps = found.steps
            self._event("cadence", every_steps=found.steps, arithmetic=found.arithmetic)

    def _measured(self, step_s: float) -> Measured:
        past = self._past() or Past()
        return Measured(
            step_s=max(1e-6, step_s),
            save_s=statistics.median(self._saves_s),
            persist_s=statistics.median(self._persists_s),
            restart_s=statistics.median(self._restarts_s),
            trained_s=past.trained_s + self._trained_s,
            failures=past.failures + self._attempts - 1,
        )
