"""Latents and text embeddings of a whole source, made before a run by Ray Data on all nodes of a cluster.

What exists is not made again: a shard is written complete or not at all, and `index.json` only when all are there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig, to_dict
from orchestrator.data.encoding import NOTE, Encoder, plain_data, shard_name
from orchestrator.data.files import data_files
from orchestrator.driver import connect_ray
from orchestrator.errors import AlreadyExistsError, StorageError, UnbrokenError
from trainers.data.config import ColorJitter
from trainers.data.images import digest
from trainers.data.latents import FORMAT, INDEX, PREPARING
from trainers.data.samples import Source
from trainers.data.sources import open_source
from trainers.errors import ConfigError, TrainersError
from trainers.fitting import check_fits
from trainers.models import empty_model

_EMPTY = -1
"""Number of the job that makes the empty caption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a preparation came to."""

    num_samples: int
    num_shards: int
    num_found: int
    """Shards that were there already."""
    broken: tuple[str, ...]
    """Samples that could not be read, and why; others have taken their places."""


class Preparation:
    """One source, one pipeline, one place for what is made of them."""

    def __init__(self, config: RunConfig, out: str, shard_size: int) -> None:
        """Check everything that can be checked without encoding.

        Raises:
            ConfigError: nothing can be encoded, or `out` holds what was made of something else.
        """
        self._config, self._out, self._shard_size = plain_data(config), out, shard_size
        self._store = Store.reach(out)
        _check(config)
        self._source: Source = open_source(config.data, data_files)
        with torch.device("meta"):  # its shapes are enough
            check_fits(empty_model(config.model, config.seed), self._source, config)
        self.num_samples = len(self._source)
        self._shards = [shard_name(i, self._count) for i in range(self._count)]
        self._begin()
        names = set(self._store.list(""))
        self._found = [number for number, name in enumerate(self._shards) if name in names]
        self.num_found_samples = sum(map(self._rows, self._found))

    def run(self, advance: Callable[[float], None]) -> Prepared:
        """Make what is missing, on the cluster of RAY_ADDRESS or one of this machine.

        Args:
            advance: told of every amount of samples done.

        Raises:
            ConfigError: the data or a frozen part is at fault; what was made so far stays.
            StorageError: a shard could not be stored.
        """
        notes = {number: self._note(number) for number in self._found}
        jobs = [_EMPTY, *(number for number in range(self._count) if number not in notes)]
        connect_ray(self._config)
        try:
            for number, note in _encoded(self._config, self._out, self._shard_size, jobs):
                if number != _EMPTY:
                    notes[number] = note
                    advance(self._rows(number))
        finally:
            ray.shutdown()
        broken = tuple(name for number in sorted(notes) for name in notes[number].pop("broken"))
        for number, note in notes.items():
            if note != notes[0]:
                raise ConfigError(
                    f"{self._out}: {self._shards[number]} and {self._shards[0]} were made with other frozen parts"
                    f" ({note} and {notes[0]}); prepare into another folder"
                )
        self._store.write(INDEX, [json.dumps(self._index(notes[0], broken), indent=1).encode()])
        return Prepared(num_samples=self.num_samples, num_shards=self._count, num_found=len(self._found), broken=broken)

    @property
    def _count(self) -> int:
        return -(-self.num_samples // self._shard_size)

    def _rows(self, number: int) -> int:
        return min(self._shard_size, self.num_samples - number * self._shard_size)

    def _begin(self) -> None:
        """Write down what is being made here, or check that it is the same as the last time."""
        config = self._config
        data = {key: value for key, value in to_dict(config)["data"].items() if key not in ("path", "cache")}
        settings = {
            "format": FORMAT,
            "source": self._source.identity or config.data.source,
            "num_samples": self.num_samples,
            "shard_size": self._shard_size,
            "batch_size": config.train.microbatch_size,  # of the encoders; on some devices it decides the last bits
            "data": data,
            "pretrained": config.model.pretrained,
            "conditioning": to_dict(config)["conditioning"],
        }
        try:  # of two that begin here at once, one is the first
            return self._store.create(PREPARING, json.dumps(settings, indent=1).encode())
        except AlreadyExistsError:
            pass
        known = self._parsed(PREPARING, self._store.read(PREPARING))
        differing = [key for key in settings if settings[key] != known.get(key)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{self._out} holds latents that are made with another {key}: {json.dumps(known.get(key))}, not"
                f" {json.dumps(settings[key])}; set it back, or prepare into another folder"
            )

    def _note(self, number: int) -> dict[str, Any]:
        """What a shard that is there says of itself."""
        name = self._shards[number]
        length = int.from_bytes(self._store.read(name, 0, 8), "little")
        header = self._parsed(name, self._store.read(name, 8, 8 + length) if length else b"")
        return json.loads(header["__metadata__"][NOTE])

    def _parsed(self, name: str, document: bytes) -> dict[str, Any]:
        try:
            return json.loads(document)
        except ValueError as error:
            raise ConfigError(
                f"{self._out}/{name} is damaged ({error}); remove it, and run the same command again"
            ) from error

    def _index(self, facts: Mapping[str, Any], broken: tuple[str, ...]) -> dict[str, Any]:
        settings = json.loads(self._store.read(PREPARING))
        return {
            "format": FORMAT,
            "identity": digest("prepared", settings, facts),
            "num_samples": self.num_samples,
            "image_size": self._config.data.image_size,
            "num_classes": self._source.num_classes,
            **facts,
            "broken": broken,
            "shards": self._shards,
        }


def _check(config: RunConfig) -> None:
    folder, data = config.model.folder(), config.data
    if folder is None or not folder.has("vae"):
        raise ConfigError("model.pretrained has no VAE to make latents with; set it to a pipeline folder that has one")
    if data.source == "latents":
        raise ConfigError("data.source=latents is prepared already; name the images that latents are to be made of")
    drawn = {
        "crop": data.crop != "center",
        "flip": data.flip,
        "rotation": data.rotation > 0,
        "color": data.color != ColorJitter(),
        "buckets": data.buckets is not None,
    }
    for key, is_set in drawn.items():
        if is_set:
            raise ConfigError(f"data.{key} can not be prepared: every image has one latent of one shape; remove it")


def _encoded(config: RunConfig, out: str, shard_size: int, jobs: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(job, what is known of its shard), as they come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one of ours is enough
    context.print_on_execution_start = False
    num_actors = min(config.max_workers, len(jobs))
    encoded = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=len(jobs)).map_batches(
        _Job,
        fn_constructor_args=(to_dict(config), out, shard_size),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_actors, initial_size=num_actors),
        num_cpus=config.resources.cpu,
        num_gpus=config.resources.gpu or None,
    )
    for row in encoded.iter_rows():
        note = json.loads(row["note"])
        if "error" in note:
            raise (ConfigError if note["kind"] == "config" else StorageError)(note["error"])
        yield int(row["job"]), note


class _Job:
    """What Ray Data keeps in each of its actors. An error of ours comes back as a value: Ray would bury it."""

    def __init__(self, config: Mapping[str, Any], out: str, shard_size: int) -> None:
        self._arguments = (config, out, shard_size)
        self._encoder: Encoder | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        (job,) = batch["job"].tolist()
        try:
            self._encoder = self._encoder or Encoder(*self._arguments)
            note = {} if job == _EMPTY else self._encoder.write_shard(job)
            if job == _EMPTY:
                self._encoder.write_empty()
        except (TrainersError, UnbrokenError) as error:
            note = {"error": str(error), "kind": "config" if isinstance(error, TrainersError) else "storage"}
        return {"job": [job], "note": [json.dumps(note)]}
