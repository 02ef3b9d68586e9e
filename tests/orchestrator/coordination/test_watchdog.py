from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest

from orchestrator.coordination.watchdog import Phase, Silence, Watchdog, WatchdogConfig
from trainers.errors import ConfigError


class Clock:
    """Drives a watchdog the way the hub does: a look every quarter of a second."""

    def __init__(self, config: WatchdogConfig | None = None, world_size: int = 2) -> None:
        self.now = 100.0
        self.dog = Watchdog(config or WatchdogConfig(), world_size)
        self.dog.launched(self.now)

    def wait(self, seconds: float) -> bool:
        """Let time pass; whether the limit was reached in it."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.25)
            self.dog.advance(self.now)
            if self.dog.expired:
                return True
        return False

    def step(self, seconds: float, times: int = 1) -> None:
        for _ in range(times):
            assert not self.wait(seconds)
            self.dog.stepped(self.now)


def test_learns_the_limit_from_the_longest_step() -> None:
    clock = Clock()
    clock.step(30.0)  # the first step compiles, warms up, reads: it teaches nothing
    clock.step(0.1, times=5)
    assert clock.dog.limit_s == 5.0 and not clock.wait(4.9) and clock.wait(0.5)
    clock = Clock()
    clock.step(1.0, times=20)
    clock.step(3.0)
    clock.step(1.0, times=50)
    assert clock.dog.limit_s == 24.0 and not clock.wait(23.5) and clock.wait(0.5)
    clock.dog.launched(clock.now)
    clock.step(1.0, times=101)
    assert clock.dog.limit_s == 8.0, "what is longer ago than 100 steps counts no more"


def test_a_start_has_a_limit_of_its_own_for_each_part() -> None:
    clock = Clock(WatchdogConfig(timeout_s=2.0, start_timeout_s=60.0))
    for _ in range(3):
        assert not clock.wait(59.0)
        clock.dog.moved(clock.now)
    clock.step(59.0)
    assert not clock.wait(1.5) and clock.wait(0.5)


def test_saves_take_the_time_they_take() -> None:
    clock = Clock(WatchdogConfig(start_timeout_s=60.0))
    clock.step(0.1, times=5)
    clock.dog.entered(1, Phase.STORING, clock.now)
    assert not clock.wait(7200.0), "storage has limits of its own"
    clock.dog.entered(1, Phase.SAVING, clock.now)
    clock.dog.stepped(clock.now)  # rank 0 is through its save already
    assert not clock.wait(59.0)
    clock.dog.entered(1, Phase.TRAINING, clock.now)
    clock.dog.stepped(clock.now)
    assert clock.dog.limit_s == 5.0, "a save is no step time"
    assert clock.wait(5.5)


def test_an_evaluation_takes_the_time_it_takes() -> None:
    clock = Clock(WatchdogConfig(start_timeout_s=60.0))
    clock.step(0.1, times=5)
    for _ in range(3):  # three parts of it, far longer than a step
        clock.dog.entered(0, Phase.EVALUATING, clock.now)
        assert not clock.wait(59.0)
    clock.dog.entered(1, Phase.TRAINING, clock.now)
    assert not clock.wait(59.0), "rank 0 is not through yet"
    clock.dog.entered(0, Phase.TRAINING, clock.now)
    clock.step(0.1)
    assert clock.dog.limit_s == 5.0, "an evaluation is no step time"
    clock.dog.entered(0, Phase.EVALUATING, clock.now)
    assert clock.wait(60.5), "but it may hang"


class LoadedMachine:
    """Two trainers on a machine that others keep busy too, by a seed, on a clock of its own; the hub is late too."""

    def __init__(self, work_s: float, seed: int) -> None:
        self.clock = Clock()
        self._work_s = work_s
        self._random = random.Random(seed)
        self._calm_until, self._load = 0.0, 1.0
        self.alarms = 0

    def train(self, hours: float) -> None:
        dog, end, steps = self.clock.dog, self.clock.now + 3600 * hours, 0
        while self.clock.now < end:
            if steps % 3000 == 0:  # a restart
                dog.launched(self.clock.now)
                for seconds in (3.0, 1.0, 10 * self._work_s):
                    self.work(seconds)
                    dog.moved(self.clock.now)
            self.work(self._work_s * self._random.lognormvariate(0.0, 0.2), pauses=True)
            dog.stepped(self.clock.now)
            steps += 1
            if steps % 50 == 0:
                self._apart(Phase.SAVING, self._random.uniform(0.1, 2.0))
            if steps % 400 == 0:
                self._apart(Phase.STORING, self._random.uniform(0.0, 60.0))
            if steps % 500 == 0:
                self._apart(Phase.EVALUATING, 30 * self._work_s)

    def work(self, seconds: float, pauses: bool = False) -> None:
        """So much of the CPU, beside others who want it; and now and then a collection of garbage, or a slow disk."""
        asleep = 0.0
        if pauses:
            seconds += self._random.uniform(0.3, 1.5) * (self._random.random() < 0.005)
            asleep = self._random.uniform(1.0, 3.5) * (self._random.random() < 0.001)
        if self.clock.now > self._calm_until:
            self._load = self._random.choice([1.0, 1.0, 1.2, 3.0, 8.0, 24.0])
            self._calm_until = self.clock.now + self._random.uniform(5.0, 120.0)
        self.pass_time(asleep, 0.0)
        self.pass_time(seconds * self._load, 1 - 1 / self._load)

    def pass_time(self, seconds: float, hungry: float) -> None:
        """Args: hungry: part of the time that the trainers want to run and are not let."""
        clock, end, told = self.clock, self.clock.now + seconds, self.clock.now
        while clock.now < end:
            look_s = 0.25 * self._random.uniform(1.0, 1.0 + self._load / 4)
            clock.now = min(end, clock.now + look_s)
            if clock.now - told >= 0.5 or clock.now == end:
                for rank in range(2):
                    clock.dog.starved(rank, hungry * (clock.now - told))
                told = clock.now
            clock.dog.advance(clock.now)
            if clock.dog.expired:
                self.alarms += 1
                clock.dog.alarmed()

    def _apart(self, phase: Phase, seconds: float) -> None:
        for rank in range(2):
            self.clock.dog.entered(rank, phase, self.clock.now)
        self.work(seconds)
        for rank in range(2):
            self.clock.dog.entered(rank, Phase.TRAINING, self.clock.now)


@pytest.mark.parametrize("work_s", [0.1, 0.3, 1.0, 5.0])
def test_two_hours_on_a_loaded_machine_are_no_alarm_and_a_stop_is_one(work_s: float) -> None:
    machine = LoadedMachine(work_s, seed=2)
    machine.train(hours=2.0)
    assert machine.alarms == 0
    clock = machine.clock
    clock.dog.stepped(clock.now)
    limit_s, since = clock.dog.limit_s, clock.now
    assert 5.0 <= limit_s <= max(5.0, 8 * (5 * work_s * 2 + 5))
    while not clock.dog.expired:  # asleep for good
        clock.now += 0.25
        clock.dog.starved(0, 0.0)
        clock.dog.advance(clock.now)
    assert clock.now - since <= limit_s + 0.25


def test_who_hangs_while_computing_on_a_loaded_machine_is_found_too() -> None:
    clock = Clock()
    clock.step(0.1, times=5)
    since = clock.now
    while not clock.dog.expired:
        clock.now += 0.25
        clock.dog.starved(1, 0.25 * 23 / 24)
        clock.dog.advance(clock.now)
    assert 5.0 < clock.now - since <= 25.25
    explicit = Clock(WatchdogConfig(timeout_s=2.0))
    explicit.step(0.1, times=5)
    explicit.dog.starved(1, 100.0)
    assert explicit.wait(2.0), "what is set is meant"


def test_a_suspended_machine_and_a_busy_coordinator_are_no_hang() -> None:
    clock = Clock()
    clock.step(0.1, times=5)
    for pause_s in (3600.0, 30.0, 86400.0):
        clock.now += pause_s
        clock.dog.advance(clock.now)
        assert not clock.dog.expired
    assert clock.wait(3.0)


def test_an_alarm_doubles_the_limit_until_there_is_more_to_learn_from() -> None:
    clock = Clock()
    clock.step(0.1, times=5)
    for expected in (5.0, 10.0, 20.0):
        assert clock.dog.limit_s == expected
        clock.dog.alarmed()
    clock.step(0.1, times=101)
    assert clock.dog.limit_s == 5.0


def test_nothing_is_expected_of_an_attempt_that_has_ended() -> None:
    clock = Clock()
    clock.step(0.1, times=5)
    clock.dog.ended()
    assert not clock.wait(3600.0)


def test_silence_counts_looks_not_pauses() -> None:
    silence = Silence(0.0)
    assert silence.passed(0.5) == 0.5 and silence.passed(600.0) == 1.5
    silence.heard()
    assert silence.passed(600.25) == 0.25


@pytest.mark.parametrize("values", [{"timeout_s": 0.0}, {"timeout_s": -1.0}, {"start_timeout_s": 0.0}])
def test_refuses(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        WatchdogConfig(**values)


def count_lines(call: Callable[[], object]) -> int:
    """How many lines of Python run in a call."""
    lines = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def test_a_look_costs_the_same_whatever_the_number_of_ranks() -> None:
    counts = set()
    for world_size in (2, 500):
        clock = Clock(world_size=world_size)
        clock.step(0.1, times=3)
        counts.add(count_lines(lambda dog=clock.dog: (dog.expired, dog.stepped(200.0), dog.limit_s)))
    assert len(counts) == 1, counts
