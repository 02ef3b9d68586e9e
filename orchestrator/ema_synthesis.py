"""Post-hoc EMA: an average of any width, from the power profiles in the checkpoints that a run has kept.

Tensors are read, combined and handed on in groups, so memory holds a group and never the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.reader import Destination, read_rows
from orchestrator.checkpoint.selection import select_checkpoint
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import safetensors_header
from orchestrator.config import RunConfig
from orchestrator.run_identity import config_of
from trainers.ema import EMAConfig, check_sigma_rel, gamma_of
from trainers.errors import ConfigError
from trainers.posthoc_ema import Profile, Reconstruction, WeightedSum, reconstruct
from trainers.shards import Chunk, TensorSpec

_GROUP_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One power profile in one checkpoint."""

    manifest: Manifest
    profile: str
    """Its name in the config."""
    weights: Profile


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """An average that can be made."""

    store: Store
    manifest: Manifest
    """The checkpoint at whose step the average ends."""
    sigma_rel: float
    snapshots: tuple[Snapshot, ...]
    reconstruction: Reconstruction

    @property
    def specs(self) -> list[TensorSpec]:
        """Every parameter, under its own name."""
        prefix = f"ema/{self.snapshots[0].profile}/"
        specs = [self.manifest.spec(name) for name in self.manifest.tensors if name.startswith(prefix)]
        return [TensorSpec(name=spec.name.removeprefix(prefix), dtype="F32", shape=spec.shape) for spec in specs]

    @property
    def num_bytes(self) -> int:
        """Size of the result."""
        return sum(_num_bytes(spec) for spec in self.specs)

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by name, whole, float32 on the CPU.

        Args:
            advance: told the number of bytes of each parameter that is done.

        Raises:
            DamagedCheckpointError: a checkpoint is not what was written.
        """
        for group in _groups(self.specs):
            sums = [WeightedSum(spec.shape) for spec in group]
            for snapshot, coefficient in zip(self.snapshots, self.reconstruction.coefficients, strict=True):
                for total, tensor in zip(sums, self._read(snapshot, group), strict=True):
                    total.add(tensor, coefficient)
            for spec, total in zip(group, sums, strict=True):
                yield spec.name, total.result()
                advance(_num_bytes(spec))

    def write(self, path: Path, advance: Callable[[int], None] = lambda _: None) -> None:
        """Write the average as one safetensors file, which appears under its name when it is whole."""
        chunks, end = [], 0
        for spec in self.specs:
            begin, end = end, end + _num_bytes(spec)
            chunks.append(Chunk(spec=spec, row_offset=0, num_rows=spec.num_rows, begin=begin, end=end))
        metadata = {
            "format": "pt",
            "kind": "post-hoc EMA",
            "sigma_rel": repr(self.sigma_rel),
            "residual": repr(self.reconstruction.residual),
            "run_id": self.manifest.run_id,
            "step": str(self.manifest.progress.step),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        with unfinished.open("wb") as file:
            file.write(safetensors_header(chunks, end, metadata))
            for _, tensor in self.tensors(advance):
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def _read(self, snapshot: Snapshot, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
        tensors, wanted = [], []
        for spec in specs:
            stored = TensorSpec(name=f"ema/{snapshot.profile}/{spec.name}", dtype=spec.dtype, shape=spec.shape)
            tensor = torch.empty(spec.shape)
            out = tensor.view(-1).view(torch.uint8).numpy().data
            wanted.append(Destination(spec=stored, row_offset=0, num_rows=spec.num_rows, out=out))
            tensors.append(tensor)
        read_rows(self.store, snapshot.manifest, wanted)
        return tensors


def open_synthesis(url: str, sigma_rel: float, step: int | None = None) -> Synthesis:
    """The average of width `sigma_rel` at the newest stable checkpoint of the run at `url`, or at that of `step`.

    Raises:
        RunNotFoundError: there is no run.
        ConfigError: no such width or checkpoint, or the run has no power profiles that go together.
    """
    store = Store.reach(url)
    config = config_of(store)
    manifest = select_checkpoint(store, step).manifest
    assert manifest is not None
    return synthesize(store, config, manifest, sigma_rel)


def synthesize(store: Store, config: RunConfig, manifest: Manifest, sigma_rel: float) -> Synthesis:
    """The average of width `sigma_rel` at the step of `manifest`, from that and earlier checkpoints in `store`.

    Raises:
        ConfigError: no such width, or the run has no power profiles that go together.
    """
    check_sigma_rel(sigma_rel)
    profiles = _power_profiles(config, store.url)
    snapshots = tuple(_snapshots(store, manifest, profiles))
    times = {snapshot.weights.time for snapshot in snapshots if snapshot.manifest is manifest}
    if not times:
        start = next(iter(profiles.values())).start_step
        raise ConfigError(
            f"step={manifest.progress.step} is before start_step={start} of the power profiles; take a later step"
        )
    target = Profile(time=times.pop(), gamma=gamma_of(sigma_rel))
    return Synthesis(
        store=store,
        manifest=manifest,
        sigma_rel=sigma_rel,
        snapshots=snapshots,
        reconstruction=reconstruct([snapshot.weights for snapshot in snapshots], target),
    )


def _power_profiles(config: RunConfig, where: str) -> dict[str, EMAConfig]:
    profiles = {name: profile for name, profile in config.ema.items() if profile.kind == "power"}
    if not profiles:
        raise ConfigError(
            f"{where} has no EMA profile of kind=power, which this is made from; train with two of them, of sigma_rel"
            " 0.05 and 0.1"
        )
    clocks = {(profile.start_step, profile.every) for profile in profiles.values()}
    if len(clocks) > 1:
        raise ConfigError(
            f"the power profiles {', '.join(profiles)} of {where} differ in start_step or every, so they do not go"
            " together; train with the same for all"
        )
    return profiles


def _snapshots(store: Store, last: Manifest, profiles: dict[str, EMAConfig]) -> Iterator[Snapshot]:
    """All that is kept up to `last`, oldest first; of a step that was saved twice (bitwise the same), one."""
    manifests = {last.progress.step: last}
    for info in list_checkpoints(store):
        if info.state is CheckpointState.STABLE and not info.expired and info.manifest is not None:
            manifests.setdefault(info.step, info.manifest)
    for step in sorted(step for step in manifests if step <= last.progress.step):
        for name, config in profiles.items():
            saved = manifests[step].scalars["ema"][name]
            if saved["started"]:
                profile = Profile(time=saved["num_updates"] + 1, gamma=config.exponent)
                yield Snapshot(manifest=manifests[step], profile=name, weights=profile)


def _groups(specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Neighbours that are read together: requests cost more than bytes."""
    group: list[TensorSpec] = []
    for spec in specs:
        if group and sum(map(_num_bytes, group)) + _num_bytes(spec) > _GROUP_BYTES:
            yield group
            group = []
        group.append(spec)
    if group:
        yield group


def _num_bytes(spec: TensorSpec) -> int:
    return spec.num_rows * spec.row_bytes
