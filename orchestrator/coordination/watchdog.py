"""Is the attempt getting on? A clock that counts only while somebody could have made progress.

Times come from the steps themselves, so a limit needs no setting and grows with a slow model or a busy machine.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum

from trainers.errors import ConfigError

TICK_S = 0.25
"""Seconds between two looks at the clock."""

_MAX_ADVANCE_S = 1.0
"""What one look may add. A suspended machine, or storage that held up the coordinator, is nobody's hang."""

_MOST_FORGIVEN = 0.8
"""Part of a silence that is not counted, at most, because a trainer wanted to run and was not let. Not all of it: who
hangs while it computes wants to run, too."""

_MIN_LIMIT_S = 5.0
_STEPS_OF_THE_LONGEST = 8.0
_WINDOW = 100

STOPPED_LIMIT_S = 2.0
"""Seconds in which a process may be stopped by a signal. The kernel says so itself: there is nothing to learn."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a trainer that makes no progress is ended and started anew."""

    timeout_s: float | None = None
    """Seconds without a completed step, > 0. null: 8 times the longest of the last 100 steps, at least 5 s; of what a
    trainer wants to run and others have the CPU, a fifth counts."""
    start_timeout_s: float = 1800.0
    """Seconds, > 0, for each part of a start (connect, build, restore, first step), for the copy of a save, and for
    each part of an evaluation (a microbatch, or the images of a grid that a worker draws at once)."""

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s:g} must be above 0; null learns it from the step times")
        if not self.start_timeout_s > 0:
            raise ConfigError(f"start_timeout_s={self.start_timeout_s:g} must be above 0")


SILENT_LIMIT_S = 10.0
"""Seconds in which an agent, or the hub, may give no sign of life. They send one every `BEAT_S`."""

BEAT_S = 0.5


class Silence:
    """Seconds since a peer was heard. A pause of the listener itself counts as one look, whatever its length."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._silent_s = 0.0

    def heard(self) -> None:
        self._silent_s = 0.0

    def passed(self, now: float) -> float:
        """Let the time since the last look pass; the sum since something was heard."""
        self._silent_s += min(max(0.0, now - self._now), _MAX_ADVANCE_S)
        self._now = now
        return self._silent_s


class Phase(Enum):
    """What a rank is doing, as far as a limit in time depends on it."""

    STARTING = "starting"  # until its first completed step
    TRAINING = "training"
    EVALUATING = "evaluating"  # validates, or draws samples: a part of either takes as long as it takes
    SAVING = "saving"  # copies its rows: no step for as long as that takes
    STORING = "storing"  # waits for storage, which has limits of its own
    DONE = "done"


class Watchdog:
    """Silence of all ranks together, measured against what they are doing. Pure: told the time by its caller."""

    def __init__(self, config: WatchdogConfig, world_size: int) -> None:
        self._config = config
        self._world_size = world_size
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._phases: dict[int, Phase] = {}
        self._counts: Counter[Phase] = Counter()
        self._now = 0.0
        self._elapsed_s = 0.0
        self._silence = 0
        """Number of the silence that goes on; each sign of progress begins another one."""
        self._starved: dict[int, tuple[int, float]] = {}
        """By rank: in which silence, and for how long it wanted to run."""
        self._starved_s = 0.0
        """Longest of these in this silence."""
        self._stepping = False
        self._running = False

    def launched(self, now: float) -> None:
        """A new attempt starts."""
        self._phases = dict.fromkeys(range(self._world_size), Phase.STARTING)
        self._counts = Counter({Phase.STARTING: self._world_size})
        self._now, self._stepping, self._running = now, False, True
        self._begin_silence()

    def ended(self) -> None:
        """The attempt is over; nothing is expected of anyone."""
        self._running = False

    def entered(self, rank: int, phase: Phase, now: float) -> None:
        """A rank says what it does now."""
        self.advance(now)
        self._counts[self._phases.get(rank, Phase.DONE)] -= 1
        self._counts[phase] += 1
        self._phases[rank] = phase
        self._stepping = False
        self._begin_silence()

    def moved(self, now: float) -> None:
        """Some rank has got on with its start."""
        self.advance(now)
        self._begin_silence()

    def stepped(self, now: float) -> None:
        """A step is complete; ranks go step by step together, so one report stands for all."""
        self.advance(now)
        if self._stepping:  # an interval from step to step, with nothing else in it
            self._durations.append(self.silent_s)
        if self._counts[Phase.STARTING]:
            self._phases.update({r: Phase.TRAINING for r, phase in self._phases.items() if phase is Phase.STARTING})
            self._counts[Phase.TRAINING] += self._counts.pop(Phase.STARTING)
        self._stepping = True
        self._begin_silence()

    def alarmed(self) -> None:
        """The limit was reached: twice that from now on, until there are 100 newer steps to learn from."""
        self._durations.append(2 * self.limit_s / _STEPS_OF_THE_LONGEST)

    def advance(self, now: float) -> None:
        """Let the time since the last call pass, or as much of it as counts."""
        self._elapsed_s += min(max(0.0, now - self._now), _MAX_ADVANCE_S)
        self._now = now

    def starved(self, rank: int, seconds: float) -> None:
        """For so long, since this was last said, the trainer of a rank wanted to run, and others had the CPU."""
        silence, before = self._starved.get(rank, (self._silence, 0.0))
        total = seconds + (before if silence == self._silence else 0.0)
        self._starved[rank] = (self._silence, total)
        self._starved_s = max(self._starved_s, total)

    def _begin_silence(self) -> None:
        self._silence += 1
        self._elapsed_s = self._starved_s = 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of progress. If the limit is learned, those in which the machine was too busy to
        let a rank run count in part."""
        if self._config.timeout_s is not None:
            return self._elapsed_s
        return self._elapsed_s - min(self._starved_s, _MOST_FORGIVEN * self._elapsed_s)

    @property
    def limit_s(self) -> float:
        """Seconds of silence that are too many in this phase."""
        if self._counts[Phase.STORING] or not self._running:
            return float("inf")
        generous = max(self._config.start_timeout_s, self._config.timeout_s or 0.0)
        if self._counts[Phase.TRAINING] < self._world_size:
            return generous
        if self._config.timeout_s is not None:
            return self._config.timeout_s
        if not self._durations:
            return generous
        return max(_MIN_LIMIT_S, _STEPS_OF_THE_LONGEST * max(self._durations))

    @property
    def expired(self) -> bool:
        return self.silent_s >= self.limit_s
