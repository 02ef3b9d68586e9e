"""A world in which time, storage and scheduling are a function of a seed.

Every actor has a stack of its own, and only one runs at a time: whoever is next on the virtual clock. It gives up
control in every storage operation, before it takes effect and after. Faults are drawn from the seed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import greenlet

from orchestrator.checkpoint.backend import Backend
from orchestrator.checkpoint.store import Store


class Died(BaseException):
    """The process is gone; no handler of errors runs."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Probabilities at each storage operation."""

    crash: float = 0.0
    """The process dies, before the operation, or after it and before it learns the answer."""
    sleep: float = 0.0
    """The process stops for long: what becomes of it when others took over is a zombie."""
    sleep_s: float = 0.0
    """The longest sleep."""
    fail: float = 0.0
    """Nothing happens but an error."""
    lost: float = 0.0
    """It happens, and the answer is lost."""
    late: float = 0.0
    """A write fails for its caller and happens later, and so do its repetitions."""
    garble: float = 0.0
    """A write stores other bytes, and says nothing."""


NO_FAULTS = Faults()
LATE_S = 250.0


@dataclass(eq=False)
class Process:
    """Dies as a whole."""

    name: str
    faults: Faults = NO_FAULTS
    attempt: int = 0
    dead: bool = False
    pruning: bool = False
    touched_when_superseded: set[str] = field(default_factory=set)


NETWORK = Process("network")
"""Delivers what was sent before; nobody's doing any more."""


class _Actor:
    def __init__(self, world: World, process: Process, function: Callable[[], None]) -> None:
        self.process, self._function = process, function
        self.stack = greenlet.greenlet(self._run, world.hub)  # to which it returns, with whatever it raises

    def _run(self) -> None:
        try:
            if not self.process.dead:
                self._function()
        except Died:
            self.process.dead = True


class World:
    """The clock, the objects, and who is next."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.objects: dict[str, bytes] = {}
        self.folders: dict[str, dict[str, None]] = {}
        """What is directly below each, which is asked for most."""
        self.trace: list[str] = []
        self.current: _Actor | None = None
        self.hub = greenlet.getcurrent()
        self.on_effect: Callable[[Process, str, str, bytes | None], None] = lambda *_: None
        """Told of (process, verb, key, what the key held before), after each change."""
        self._queue: list[tuple[float, int, _Actor | Callable[[], None]]] = []
        self._count = 0

    def spawn(self, process: Process, function: Callable[[], None], delay_s: float = 0.0) -> None:
        """Run `function` as a part of `process`."""
        self.after(delay_s, _Actor(self, process, function))

    def after(self, delay_s: float, what: _Actor | Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, what))

    def run(self) -> None:
        """Until nothing is left to happen. Raises what an actor raised."""
        try:
            while self._queue:
                self.now, _, what = heapq.heappop(self._queue)
                if isinstance(what, _Actor):
                    self._resume(what)
                else:
                    what()
        finally:
            for _, _, what in self._queue:  # leave no stack behind in the middle of something
                if isinstance(what, _Actor) and what.stack:
                    what.process.dead = True
                    with suppress(BaseException):
                        self._resume(what)

    def _resume(self, actor: _Actor) -> None:
        """Until it pauses or ends. Raises what it raises."""
        self.current = actor
        actor.stack.switch()

    @property
    def idle(self) -> bool:
        """Whether nobody but the actor that asks has anything to do."""
        return not self._queue

    def pause(self, delay_s: float) -> None:
        """Let time pass for the actor that calls."""
        actor = self.current
        assert actor is not None
        if self._queue and self._queue[0][0] <= self.now + delay_s:
            self.after(delay_s, actor)
            self.hub.switch()
        else:
            self.now += delay_s  # nobody else is due before
        if actor.process.dead:
            raise Died

    def change(self, process: Process, verb: str, key: str, data: bytes | None) -> None:
        """Make an object hold `data`, or be gone."""
        before = self.objects.get(key)
        folder, _, name = key.rpartition("/")
        if data is None:
            self.objects.pop(key, None)
            while folder and not self._remove(folder, name):
                folder, _, name = folder.rpartition("/")
        else:
            self.objects[key] = data
            while folder and name not in (names := self.folders.setdefault(folder, {})):
                names[name] = None
                folder, _, name = folder.rpartition("/")
        self.trace.append(f"{self.now:.3f} {process.name} {verb} {key}")
        self.on_effect(process, verb, key, before)

    def _remove(self, folder: str, name: str) -> bool:
        """Whether anything is left in the folder."""
        names = self.folders.get(folder, {})
        names.pop(name, None)
        return bool(names)


def virtual_store(world: World, process: Process) -> Store:
    """The world's objects as one process sees them: the real `Store` over a virtual backend."""
    return Store("virtual://run", "run", VirtualBackend(world, process))


class VirtualTime:
    """In the place of `time` where `Store` waits and watches its deadline."""

    def __init__(self, world: World) -> None:
        self.sleep = world.pause
        self.monotonic = lambda: world.now


class VirtualBackend(Backend):
    """Each operation gives up control before it takes effect and after, and draws its faults."""

    kind = "virtual"
    pieces_at_once = 1

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process
        self._stuck_path = ""

    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        self._before()
        return self._after(self._get(path)[begin:end])

    def size(self, path: str) -> int:
        self._before()
        return self._after(len(self._get(path)))

    def list(self, path: str) -> list[str]:
        self._before()
        folder = path.removeprefix("run/")
        return self._after(list(self._world.folders.get(folder, ())))

    def write(self, path: str, parts: Sequence[memoryview]) -> None:
        data = b"".join(bytes(part) for part in parts)
        if self._chance(self._process.faults.garble):
            at = self._world.rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        self._act("write", path, data, lambda key: True)

    def delete(self, path: str) -> None:
        self._act("delete", path, None, lambda key: key in self._world.objects)

    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        if not self._act("create", path, data, lambda key: key not in self._world.objects):
            raise FileExistsError(path)

    def _act(self, verb: str, path: str, data: bytes | None, possible: Callable[[str], bool]) -> bool:
        """Whether it had an effect. `possible` is asked at that moment."""
        key = path.removeprefix("run/")

        def take_effect(sender: Process = self._process) -> bool:
            if possible(key):
                self._world.change(sender, verb, key, data)
                return True
            return False

        self._before()
        if path == self._stuck_path or self._chance(self._process.faults.late):
            self._stuck_path = path
            self._world.after(self._world.rng.uniform(0, LATE_S), lambda: take_effect(NETWORK) and None)
            raise TimeoutError("no answer")
        done = take_effect()
        if self._chance(self._process.faults.lost):
            raise TimeoutError("no answer")
        return self._after(done)

    def _before(self) -> None:
        faults = self._process.faults
        if faults is not NO_FAULTS:
            if self._chance(faults.crash):
                raise Died
            if self._chance(faults.fail):
                self._world.pause(self._world.rng.random())
                raise TimeoutError("unreachable")
            if self._chance(faults.sleep):
                self._world.pause(self._world.rng.uniform(0, faults.sleep_s))
        self._world.pause(self._world.rng.random())

    def _after(self, answer):
        if self._chance(self._process.faults.crash):
            raise Died
        self._world.pause(self._world.rng.random() * 0.2)
        return answer

    def _get(self, path: str) -> bytes:
        try:
            return self._world.objects[path.removeprefix("run/")]
        except KeyError:
            raise FileNotFoundError(path) from None

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._world.rng.random() < probability
