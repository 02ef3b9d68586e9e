"""A run that nothing happens to: trained on one rank with neither Ray nor agents, and kept as every run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.agents.snapshot_layout import layout, owned_tensors
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import commit
from tests.orchestrator.checkpoint.shards import write_shard
from tests.orchestrator.checkpoint.states import make_info
from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny
from trainers.state import TrainState
from trainers.step import train_step


def make_straight_run(url: str, config: Mapping[str, Any], every: int) -> None:
    """Train `config` to its end in a process, with a checkpoint every so many steps."""
    run_ranks(1, _train, url, config, every)


def _train(url: str, config: Mapping[str, Any], every: int) -> None:
    store = Store.open(url)
    open_or_create(store, config)
    state, task = build_tiny(config)
    while state.progress.step < config["train"]["num_steps"]:
        train_step(state, task)
        if state.progress.step % every == 0:
            _save(store, state)


def _save(store: Store, state: TrainState) -> None:
    state.generators.capture()
    tensors = owned_tensors(state)
    parts = [one.tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in tensors]
    key = CheckpointRef(state.progress.samples_seen, 1).shard(0, 1)
    receipt = write_shard(store, key, layout(tensors), memoryview(b"".join(parts)), {})
    commit(store, [receipt], make_info(state.progress.step, 1, progress=state.progress, scalars=state.scalars()))
