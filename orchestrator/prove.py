"""The proof that two runs are the same: every bit of the state at every checkpoint that both have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from orchestrator.checkpoint import run_record
from orchestrator.checkpoint.catalog import CheckpointState, scan_checkpoints
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from trainers.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first thing that is not the same."""

    progress: Progress
    name: str
    """A tensor, or `scalars/...`."""
    runs: str
    """Which two manifests differ."""
    a: str
    b: str

    def __str__(self) -> str:
        return f"step {self.progress.step}, {self.name}: {self.a} against {self.b} ({self.runs})"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared, and the outcome."""

    num_checkpoints: int
    """Checkpoints that both runs have."""
    num_tensors: int
    """Tensors compared in them."""
    num_replays: int
    """Checkpoints that a second attempt of the same run made once more; compared too."""
    last: Progress
    """The newest checkpoint that both runs have."""
    first_difference: Difference | None
    """None: bitwise the same."""
    fingerprint: str
    """XXH3-128 over all compared checkpoints of run A; that of B too, if there is no difference."""

    @property
    def equal(self) -> bool:
        return self.first_difference is None


def prove(store_a: Store, store_b: Store) -> Proof:
    """Compare two runs by the fingerprints in their manifests; the shards themselves are not read.

    For each progress the stable checkpoint of the newest attempt counts. Others that the same run has at that
    progress must be equal to it: a step replayed after a restart gives the same bits or the run is not deterministic.

    Raises:
        RunNotFoundError: one of them is no run.
        UnbrokenError: they have no checkpoint in common, which proves nothing.
    """
    runs = []
    for store in (store_a, store_b):
        run_record.load(store)
        runs.append(_by_progress(store))
    a, b = runs
    shared = sorted(a.keys() & b.keys(), key=_order)
    if not shared:
        raise UnbrokenError(
            f"{store_a.url} and {store_b.url} have no stable checkpoint in common (they have {len(a)} and {len(b)}); "
            "use the same checkpoint.every_steps, and let both runs reach one"
        )
    pairs = [("run A, run B", a[progress][0], b[progress][0]) for progress in shared]
    replays = [*_replays("A", a), *_replays("B", b)]
    differences = (d for pair in sorted(pairs + replays, key=lambda p: _order(p[1].progress)) for d in _compare(*pair))
    return Proof(
        num_checkpoints=len(shared),
        num_tensors=sum(len(a[progress][0].tensors) for progress in shared),
        num_replays=len(replays),
        last=shared[-1],
        first_difference=next(differences, None),
        fingerprint=_fingerprint([a[progress][0] for progress in shared]),
    )


def _by_progress(store: Store) -> dict[Progress, list[Manifest]]:
    """The stable checkpoints at each progress, that of the newest attempt first."""
    found: dict[Progress, list[Manifest]] = {}
    for info in scan_checkpoints(store):
        if info.state is CheckpointState.STABLE and info.manifest is not None:
            found.setdefault(info.manifest.progress, []).append(info.manifest)
    return found


def _replays(run: str, found: Mapping[Progress, list[Manifest]]) -> list[tuple[str, Manifest, Manifest]]:
    return [
        (f"run {run}, attempts {newest.attempt} and {older.attempt}", newest, older)
        for newest, *rest in found.values()
        for older in rest
    ]


def _compare(runs: str, a: Manifest, b: Manifest) -> Iterator[Difference]:
    """Every difference, in the order of names."""
    values_a, values_b = _values(a), _values(b)
    for name in sorted(values_a.keys() | values_b.keys()):
        value_a, value_b = values_a.get(name, "absent"), values_b.get(name, "absent")
        if value_a != value_b:
            yield Difference(progress=a.progress, name=name, runs=runs, a=value_a, b=value_b)


def _values(manifest: Manifest) -> dict[str, str]:
    """All of the state as text under one name each."""
    values = {
        name: f"{entry.fingerprint} {entry.dtype} {list(entry.shape)}" for name, entry in manifest.tensors.items()
    }
    values.update(_leaves("scalars", manifest.scalars))
    return values


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}/{key}", item)
    else:
        yield name, repr(value)


def _fingerprint(manifests: list[Manifest]) -> str:
    digest = xxhash.xxh3_128()
    for manifest in manifests:
        digest.update(f"{manifest.progress}\n".encode())
        for name, value in sorted(_values(manifest).items()):
            digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()


def _order(progress: Progress) -> tuple[int, int]:
    return progress.samples_seen, progress.step
