"""Two agents that do nothing, around a real coordinator and a real store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import CommitEnded, CommitJob, Picture, carry_out
from orchestrator.coordination.coordinator import Coordinator
from orchestrator.messages.attempts import Down, Event, ExitKind, Joined, Launch, TrainerExit
from orchestrator.messages.saves import Receipt
from orchestrator.run_spec import RunSpec
from orchestrator.sections import CheckpointConfig
from orchestrator.stores import Stores
from tests.orchestrator.checkpoint.shards import write_shard
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

ROWS = 4


def make_spec(run_url: str, **changes: Any) -> RunSpec:
    fields = {
        "run_id": "r",
        "run_url": run_url,
        "session": "s",
        "config": {"train": {"microbatch_size": 1}},
        "config_hash": "h",
        "strategy": "fsdp",
        "checkpoint": CheckpointConfig(every_steps=5),
        "num_steps": 20,
        "versions": {},
        "preload": (),
    }
    return RunSpec(**(fields | changes))


class PromptChores:
    """Done at once; a commit is tried once, and its end is to be handed over by whoever tests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.prunings: list[int] = []
        self.jobs: list[CommitJob] = []
        self.pictures: list[Picture] = []
        self.hand_over: Callable[[CommitEnded], None] | None = None
        """None: commits are only collected in `jobs`."""

    def commit(self, job: CommitJob) -> None:
        self.jobs.append(job)
        if self.hand_over is not None:
            self.hand_over(carry_out(self._store, job, lambda: False))

    def keep(self, picture: Picture) -> None:
        self.pictures.append(picture)

    def prune(self, attempt: int, tier: str) -> None:
        self.prunings.append(attempt)


class Group:
    """Two agents that do nothing but remember their orders."""

    def __init__(self, store: Store, peer: Store | None = None, **spec: Any) -> None:
        self.store = store
        self.orders: list[tuple[int, object]] = []
        self.events: list[Event] = []
        self.chores = PromptChores(store)
        self.prunings = self.chores.prunings
        self.coordinator = Coordinator(
            make_spec(store.url, **spec),
            Stores(storage=store, peer=peer),
            2,
            "host",
            lambda rank, order: self.orders.append((rank, order)),
            self.events.append,
            self.chores,
        )
        self.chores.hand_over = lambda ended: self.coordinator.handle(0, ended)

    def join(self) -> Group:
        self.both(Joined(rank=0), Joined(rank=1))
        return self

    def both(self, first: object, second: object | None = None) -> None:
        self.coordinator.handle(0, first)
        self.coordinator.handle(1, second or first)

    def last(self, kind: type) -> Any:
        return next(order for _, order in reversed(self.orders) if isinstance(order, kind))

    def count(self, kind: type) -> int:
        return sum(isinstance(order, kind) for _, order in self.orders)

    @property
    def attempt(self) -> int:
        return self.last(Launch).attempt

    def receipt(self, rank: int, step: int) -> Receipt:
        """What rank's agent sends when its shard of a one-tensor state is stored."""
        spec = TensorSpec(name="model/w", dtype="F32", shape=(ROWS, 2))
        data = memoryview(bytes([step % 256]) * (ROWS // 2 * 8))
        chunk = Chunk(spec=spec, row_offset=rank * 2, num_rows=2, begin=0, end=len(data))
        progress = Progress(step, step * 10)
        key = CheckpointRef(progress.samples_seen, self.attempt).shard(rank, 2)
        shard = write_shard(self.store, key, [chunk], data, {})
        return Receipt(attempt=self.attempt, progress=progress, shard=shard, scalars={"n": step})

    def save(self, step: int) -> None:
        self.both(self.receipt(0, step), self.receipt(1, step))

    def down(self, rank: int, kind: ExitKind, pending: Progress | None = None, **fields: Any) -> None:
        """Args: fields: `message`, and `held`, which without is what is pending."""
        end = TrainerExit(kind=kind, message=fields.get("message", "m"))
        held = fields.get("held", pending)
        self.coordinator.handle(rank, Down(attempt=self.attempt, exit=end, pending=pending, held=held))

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def stable_steps(store: Store) -> list[int]:
    infos = [info for info in list_checkpoints(store) if info.state is CheckpointState.STABLE]
    return [info.manifest.progress.step for info in infos if info.manifest]
