"""Causes the faults of a schedule, one after the other, while the run goes on, and watches what becomes of each."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty

from orchestrator.chaos.faults import NODE_KINDS, Fault, FaultKind
from orchestrator.chaos.nodes import Nodes, Place
from orchestrator.chaos.process import DrilledProcess
from orchestrator.chaos.scores import Injection, Score, score
from orchestrator.checkpoint.catalog import CheckpointInfo, newest_stable
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from orchestrator.messages.attempts import Event
from orchestrator.processes import birth

PARTITION_S = 60.0
"""For how long a network is cut off."""
SLOW_S = 10.0
"""For how long a store is slow."""
_END_S = 15.0
"""Seconds in which all processes of a run have to be gone when its command has ended."""


class Watch:
    """Where the run stands, by its events."""

    def __init__(self) -> None:
        self.attempt = 0
        self.step = 0
        """The last one that was complete."""
        self.step_s = 0.0
        """When it was."""
        self.step_before_s = 0.0
        """When the one before it was."""
        self.highest = 0
        self.world_size = 0
        self.moved = time.monotonic()
        """When it last got on, by the clock that is never set."""
        self.saved = False
        """A checkpoint is in storage."""
        self.training = False
        self.places: dict[int, Place] = {}
        """By rank, of this attempt."""

    def take(self, event: Event) -> None:
        fields = event.fields
        self.moved = time.monotonic() if event.kind in ("step", "saved") else self.moved
        match event.kind:
            case "attempt":
                self.attempt, self.world_size = fields["attempt"], fields["world_size"]
                self.training, self.places = False, {}
            case "trainer" if fields["attempt"] == self.attempt:
                pids = {"trainer": fields["pid"], "agent": fields["agent_pid"]}
                self.places[fields["rank"]] = Place(node=fields["node"], **pids)
            case "training":
                self.training, self.step, self.step_s = True, fields["step"], event.time_s
            case "step" if fields["attempt"] == self.attempt:
                self.step, self.step_before_s, self.step_s = fields["step"], self.step_s, event.time_s
                self.highest = max(self.highest, self.step)
            case "saved" if fields.get("tier", "storage") == "storage":
                self.saved = True
            case "down" | "agent_lost" | "group_lost" | "hang" | "regroup" | "controller_lost" | "outcome":
                self.training = False


@dataclass(frozen=True, kw_only=True)
class DrillPlan:
    """What is done to which run."""

    faults: Sequence[Fault]
    run_url: str
    num_workers: int
    """That it starts with."""
    patience_s: float
    """Longest time from a fault to the end of its recovery."""
    sizes: tuple[int, int]
    """Fewest and most workers that it may have."""


@dataclass
class _Open:
    """A fault that the run has not got over yet."""

    injection: Injection
    events: list[Event] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)


class Drill:
    """One for each drilled run."""

    def __init__(
        self,
        plan: DrillPlan,
        nodes: Nodes,
        start: Callable[[], DrilledProcess],
        say: Callable[[str], None],
        slow_store: Callable[[float], None] | None = None,
    ) -> None:
        """
        Args:
            start: runs the command of the run, once more.
            say: told one line for each fault.
            slow_store: makes the store slow for so many seconds.
        """
        self._plan = plan
        self._nodes = nodes
        self._start = start
        self._say = say
        self._slow_store = slow_store
        self._watch = Watch()
        self._waiting = [fault for fault in plan.faults if fault.kind is not FaultKind.NAN]
        self._poisoned = {fault.step: fault for fault in plan.faults if fault.kind is FaultKind.NAN}
        self._open: list[_Open] = []
        self._scores: dict[Fault, Score] = {fault: Score(fault=fault, injection=None) for fault in plan.faults}
        self._process: DrilledProcess | None = None
        self._num_workers = plan.num_workers
        self._births: dict[int, int | None] = {}

    def run(self) -> tuple[Sequence[Score], str | None]:
        """Train to the end. Returns what became of each fault, in their order, and why the run did not end well."""
        self._process = self._start()
        try:
            error = self._follow()
        finally:
            self._process.end()
        return [self._scores[fault] for fault in self._plan.faults], error

    def left_running(self) -> list[int]:
        """Ids of the trainers and agents that have outlived the run. Of a run on this machine."""
        end = time.monotonic() + _END_S
        while found := [pid for pid, born in self._births.items() if born is not None and birth(pid) == born]:
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        return found

    def _follow(self) -> str | None:
        while True:
            assert self._process is not None
            try:
                event = self._process.events.get(timeout=1.0)
            except Empty:
                pass
            else:
                if event is None:
                    code = self._process.wait()
                    return f"it ended with exit code {code}: {self._process.last_words()}" if code else None
                self._take(event)
            if late := [entry for entry in self._open if time.monotonic() - entry.since > self._plan.patience_s]:
                return self._stands_still(f"not recovered from {late[0].injection.fault.kind}")
            if time.monotonic() - self._watch.moved > self._plan.patience_s:
                return self._stands_still("made no step")
            self._nodes.tend()
            self._inject_next()

    def _stands_still(self, what: str) -> str:
        nodes = self._nodes.waiting_for()  # a machine that is too busy for a drill is not the run's fault
        return f"it has {what} in {self._plan.patience_s:g} s, and was ended" + (f"; {nodes}" if nodes else "")

    def _take(self, event: Event) -> None:
        self._watch.take(event)
        if event.kind == "trainer":
            for pid in (event.fields["pid"], event.fields["agent_pid"]):
                self._births[pid] = birth(pid)
        for entry in list(self._open):
            entry.events.append(event)
            self._judge(entry)
        if event.kind == "bad_step" and (fault := self._poisoned.pop(event.fields["step"], None)) is not None:
            watch = self._watch
            injection = Injection(
                fault=fault,
                time_s=watch.step_before_s,
                step=watch.step - 1,
                attempt=watch.attempt,
                detail="noise of one sample",
            )
            self._open.append(_Open(injection, [event]))

    def _judge(self, entry: _Open) -> None:
        found = score(entry.injection, entry.events)
        self._scores[found.fault] = found
        # The next one waits for a step that is new: what follows is not to be confused with what was.
        if found.passed and (found.resumed_step is None or self._watch.step > found.resumed_step + found.lost_steps):
            self._open.remove(entry)
            self._say(f"{found.fault.kind}: recovered after {found.recovered_s:.2f} s, {found.lost_steps} steps lost")
            if found.fault.kind is FaultKind.DRAIN:
                self._nodes.take_drained()

    def _inject_next(self) -> None:
        watch = self._watch
        if not self._waiting or any(entry.injection.fault.kind is not FaultKind.NAN for entry in self._open):
            return
        fault = self._waiting[0]
        whole = watch.training and len(watch.places) == watch.world_size >= self._least_for(fault)
        if not whole or watch.step < max(fault.step, watch.highest):
            return
        if fault.kind is FaultKind.CORRUPT_CHECKPOINT and not watch.saved:
            return
        place = watch.places[fault.rank % watch.world_size]
        # Below zero where rank 0 has just come to a machine whose clock is behind.
        time.sleep(fault.moment * min(1.0, max(0.0, watch.step_s - watch.step_before_s)))
        begun_s = time.time()
        try:
            detail = self._cause(fault, place)
        except ProcessLookupError:
            return  # it has died by itself just now: at the next step there is another one
        self._waiting.pop(0)
        injection = Injection(fault=fault, time_s=begun_s, step=watch.step, attempt=watch.attempt, detail=detail)
        self._open.append(_Open(injection))
        self._say(f"{fault.kind} after step {watch.step}: {detail}")

    def _least_for(self, fault: Fault) -> int:
        """How many workers there have to be: with fewer, nodes that were lost are on their way back."""
        if fault.kind is FaultKind.RESIZE:
            return self._num_workers
        return min(self._num_workers, self._plan.sizes[0] + (fault.kind in NODE_KINDS))

    def _cause(self, fault: Fault, place: Place) -> str:
        """Do it; what was done to what."""
        rank = fault.rank % self._watch.world_size
        nodes, node = self._nodes, f"node {place.node[:8]} of rank {rank}"
        match fault.kind:
            case FaultKind.KILL_WORKER:
                nodes.signal(place, place.trainer, signal.SIGKILL)
                return f"SIGKILL to process {place.trainer}, the trainer of rank {rank}"
            case FaultKind.KILL_AGENT:
                nodes.signal(place, place.agent, signal.SIGKILL)
                return f"SIGKILL to process {place.agent}, the agent of rank {rank}"
            case FaultKind.HANG:
                nodes.signal(place, place.trainer, signal.SIGSTOP)
                return f"SIGSTOP to process {place.trainer}, the trainer of rank {rank}"
            case FaultKind.KILL_NODE:
                nodes.lose(place)
                return f"SIGKILL to everything on {node}"
            case FaultKind.DRAIN:
                nodes.drain(place)
                return f"{node} is to be taken away"
            case FaultKind.PARTITION:
                nodes.cut_off(place, PARTITION_S)
                return f"the network of {node} is down for {PARTITION_S:g} s"
            case FaultKind.SLOW_STORE:
                assert self._slow_store is not None, "skipped without a way to do it"
                self._slow_store(SLOW_S)
                return f"the store answers after seconds, for {SLOW_S:g} s"
            case FaultKind.KILL_DRIVER:
                return self._kill_driver()
            case FaultKind.CORRUPT_CHECKPOINT:
                return self._corrupt()
            case FaultKind.RESIZE:
                before, self._num_workers = self._num_workers, self._other_size(fault)
                nodes.resize(self._watch.places, self._num_workers)
                return f"nodes for {self._num_workers} workers instead of {before}"
            case FaultKind.NAN:
                raise AssertionError("it is in the data")

    def _other_size(self, fault: Fault) -> int:
        least, most = self._plan.sizes
        others = [size for size in range(least, most + 1) if size != self._num_workers]
        return others[fault.rank % len(others)]

    def _kill_driver(self) -> str:
        assert self._process is not None
        before = self._process
        before.end()
        while (event := before.events.get()) is not None:
            self._take(event)
        self._watch.training = False
        self._process = self._start()
        return f"SIGKILL to process {before.pid}, the driver; the same command again"

    def _corrupt(self) -> str:
        assert self._process is not None
        for place in self._watch.places.values():  # first: who lives may commit a newer checkpoint
            self._nodes.signal(place, place.agent, signal.SIGKILL)
        self._process.end()
        store = Store.open(self._plan.run_url)
        newest = newest_stable(store)
        if newest is None:
            raise UnbrokenError(f"{store.url} has no stable checkpoint to corrupt, though it said so")
        name = flip_a_bit(store, newest)
        self._kill_driver()
        return f"everything killed, one bit of {newest.ref}/{name} flipped; the same command again"


def flip_a_bit(store: Store, checkpoint: CheckpointInfo) -> str:
    """Turn over one bit in the middle of the largest file of a checkpoint. Returns the name of the file."""
    assert checkpoint.manifest is not None
    file = max(checkpoint.manifest.files, key=lambda file: file.size_bytes)
    key = f"{checkpoint.ref.folder}/{file.name}"
    data = bytearray(store.read(key))
    data[(file.header_bytes + len(data)) // 2] ^= 0x10
    store.write(key, [data])
    return file.name
