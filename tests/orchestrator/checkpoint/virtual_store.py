"""A world in which time, storage and scheduling are a function of a seed.

Every actor is a thread, but only one runs at a time: whoever is next on the virtual clock. It gives up control in every
storage operation, before it takes effect and after. Faults are drawn from the seed.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError, StorageError


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
        self.process, self._world, self._function = process, world, function
        self.turn = threading.Lock()
        self.turn.acquire()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        try:
            self._world.current = self
            if not self.process.dead:
                self._function()
        except Died:
            self.process.dead = True
        except BaseException as error:
            self.error = error
        self._world.back.release()


class World:
    """The clock, the objects, and who is next."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.objects: dict[str, bytes] = {}
        self.trace: list[str] = []
        self.current: _Actor | None = None
        self.back = threading.Lock()
        self.back.acquire()
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
            for _, _, what in self._queue:  # let no thread wait for ever
                if isinstance(what, _Actor) and what.thread.ident:
                    what.process.dead = True
                    with suppress(BaseException):
                        self._resume(what)

    def _resume(self, actor: _Actor) -> None:
        """Until it pauses or ends."""
        self.current = actor
        if not actor.thread.ident:
            actor.thread.start()
        actor.turn.release()
        self.back.acquire()
        if actor.error is not None:
            raise actor.error

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
            self.back.release()
            actor.turn.acquire()
            self.current = actor
        else:
            self.now += delay_s  # nobody else is due before: no need to change threads
        if actor.process.dead:
            raise Died

    def change(self, process: Process, verb: str, key: str, data: bytes | None) -> None:
        """Make an object hold `data`, or be gone."""
        before = self.objects.get(key)
        if data is None:
            self.objects.pop(key, None)
        else:
            self.objects[key] = data
        self.trace.append(f"{self.now:.3f} {process.name} {verb} {key}")
        self.on_effect(process, verb, key, before)


class VirtualStore(Store):
    """The world's objects as one process sees them; `Store.create` and its way with lost answers are the real ones."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__("virtual://run", None, "")
        self._world, self._process = world, process
        self._stuck_key = ""

    def read(self, key: str, begin: int | None = None, end: int | None = None) -> bytes:
        self._before(StorageError)
        return self._after(self._get(key)[begin:end])

    def size(self, key: str) -> int:
        self._before(StorageError)
        return self._after(len(self._get(key)))

    def list(self, folder: str) -> list[str]:
        self._before(StorageError)
        cut = len(folder) + 1
        return self._after(
            sorted({key[cut:].split("/")[0] for key in self._world.objects if key.startswith(f"{folder}/")})
        )

    def write(self, key: str, parts) -> None:
        data = b"".join(bytes(part) for part in parts)
        if self._chance(self._process.faults.garble):
            at = self._world.rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        self._act("write", key, data, lambda: True, StorageError)

    def delete(self, key: str) -> None:
        self._act("delete", key, None, lambda: key in self._world.objects, StorageError)

    def _create_once(self, key: str, data: bytes) -> None:
        if not self._act("create", key, data, lambda: key not in self._world.objects, TimeoutError):
            raise FileExistsError(key)

    def _act(
        self, verb: str, key: str, data: bytes | None, possible: Callable[[], bool], error: type[Exception]
    ) -> bool:
        """Whether it had an effect. `possible` is asked at that moment."""

        def take_effect(sender: Process = self._process) -> bool:
            if possible():
                self._world.change(sender, verb, key, data)
                return True
            return False

        self._before(error)
        if key == self._stuck_key or self._chance(self._process.faults.late):
            self._stuck_key = key
            self._world.after(self._world.rng.uniform(0, LATE_S), lambda: take_effect(NETWORK) and None)
            raise error("no answer")
        done = take_effect()
        if self._chance(self._process.faults.lost):
            raise error("no answer")
        return self._after(done)

    def _before(self, error: type[Exception]) -> None:
        faults = self._process.faults
        if faults is not NO_FAULTS:
            if self._chance(faults.crash):
                raise Died
            if self._chance(faults.fail):
                self._world.pause(self._world.rng.random())
                raise error("unreachable")
            if self._chance(faults.sleep):
                self._world.pause(self._world.rng.uniform(0, faults.sleep_s))
        self._world.pause(self._world.rng.random())

    def _after(self, answer):
        if self._chance(self._process.faults.crash):
            raise Died
        self._world.pause(self._world.rng.random() * 0.2)
        return answer

    def _get(self, key: str) -> bytes:
        try:
            return self._world.objects[key]
        except KeyError:
            raise MissingObjectError(key) from None

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._world.rng.random() < probability
