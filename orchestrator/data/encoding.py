"""One shard of a latent cache: samples of a source, run through the frozen parts of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig
from orchestrator.data.files import data_files, with_absolute_paths
from trainers.conditioning import Condition
from trainers.data.config import DataConfig
from trainers.data.guarded import GuardedSource
from trainers.data.latents import EMPTY
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.frozen import FrozenParts, open_frozen

NOTE = "unbroken"
"""Key in a shard's own metadata under which lies what `Encoder.facts` tells, and the names of broken samples."""


def shard_name(number: int, count: int) -> str:
    """File name of one shard."""
    return f"latents-{number:05d}-of-{count:05d}.safetensors"


class Encoder:
    """Frozen parts and a source, held by one process."""

    def __init__(self, config: Mapping[str, Any], out: str, shard_size: int) -> None:
        """Args: config: of a `RunConfig`, as plain values. Raises ConfigError as `open_source` and `open_frozen` do."""
        self._config = decode(RunConfig, config)
        self._store, self._shard_size = Store.open(out), shard_size
        torch.set_num_threads(self._config.parallel.cpu_threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = open_source(self._config.data, data_files)
        self._source = GuardedSource(source, None, skip_broken=self._config.data.on_broken == "skip")
        frozen = open_frozen(self._config.model, self._config.conditioning, self._device)
        assert isinstance(frozen, FrozenParts), "checked before"
        self._frozen: FrozenParts = frozen
        used = frozen.hashes if source.has_captions else {"vae": frozen.hashes["vae"]}
        shift, scale = frozen.shift_and_scale
        self.facts = {"encoders": dict(used), "shift": shift, "scale": scale}

    def write_shard(self, number: int) -> dict[str, Any]:
        """Make one shard and store it, complete or not at all; returns what is known of it."""
        count = -(-len(self._source) // self._shard_size)
        first, stop = number * self._shard_size, min((number + 1) * self._shard_size, len(self._source))
        step, parts, broken = self._config.train.microbatch_size, [], []
        for begin in range(first, stop, step):
            tensors, names = self._encode(np.arange(begin, min(begin + step, stop)))
            parts.append(tensors)
            broken += names
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        note = {**self.facts, "broken": broken}
        self._store.write(shard_name(number, count), [save(whole, metadata={NOTE: json.dumps(note)})])
        return note

    def write_empty(self) -> None:
        """Store how the text encoders see a caption that was dropped."""
        if self._source.has_captions:
            empty = self._stored(_text_parts(self._frozen.condition(None, ("",), None)))
            self._store.write(EMPTY, [save(empty)])

    def _encode(self, indices: np.ndarray) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        samples = self._source.read(indices)
        mean, deviation = self._frozen.posterior(samples.images.to(self._device))
        found = {"mean": mean, "deviation": deviation}
        if samples.captions is not None:
            found |= _text_parts(self._frozen.condition(None, samples.captions, None))
        exact = {"sizes": samples.sizes}
        if samples.labels is not None:
            exact["labels"] = samples.labels
        return {**self._stored(found), **exact}, samples.broken

    def _stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the CPU, and no wider than what they were computed in, so that nothing is lost."""
        narrow = self._config.conditioning.precision == "bf16"
        return {
            name: tensor.to("cpu", torch.bfloat16 if narrow and tensor.is_floating_point() else None).contiguous()
            for name, tensor in tensors.items()
        }


def _text_parts(condition: Condition) -> dict[str, torch.Tensor]:
    parts = {"tokens": condition.tokens, "pooled": condition.pooled, "mask": condition.mask}
    return {name: part for name, part in parts.items() if part is not None}


def plain_data(config: RunConfig) -> RunConfig:
    """`config` without what only changes how fast or how safely its data is read."""
    placed = with_absolute_paths(config)
    usual = DataConfig()
    fields = {key: getattr(usual, key) for key in ("num_workers", "prefetch", "quarantine", "cache")}
    return replace(config, data=replace(placed.data, **fields))
