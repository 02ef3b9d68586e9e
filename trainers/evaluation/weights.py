"""The model with other weights for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainers.evaluation.config import RAW
from trainers.parallel import weights_changed
from trainers.state import TrainState


@contextmanager
def evaluated_with(state: TrainState, weights: str) -> Iterator[None]:
    """The model in evaluation mode, with the average of an EMA profile as its weights, or as it is (`raw`).

    Weights and average change places, shard by shard, and change back afterwards: bitwise, and without memory for more
    than one more shard of one parameter. Local; but the first forward pass gathers the weights anew.
    """
    averages = None if weights == RAW else state.ema.tensors()[weights]
    training = state.model.training
    state.model.eval()
    try:
        if averages is not None:
            _exchange(state, averages)
        yield
    finally:
        if averages is not None:
            _exchange(state, averages)
        state.model.train(training)


@torch.no_grad()
def _exchange(state: TrainState, averages: dict[str, torch.Tensor]) -> None:
    for parameter in state.parameters:
        kept = parameter.local.clone()
        parameter.local.copy_(averages[parameter.name])
        averages[parameter.name].copy_(kept)
    weights_changed(state.model, state.parameters)
