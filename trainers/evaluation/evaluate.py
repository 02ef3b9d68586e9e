"""Evaluation between two steps of the training loop. It changes nothing that the next step depends on."""

from __future__ import annotations

import time

from trainers.evaluation.config import RAW
from trainers.evaluation.distances import measure
from trainers.evaluation.grids import draw_grid
from trainers.evaluation.validation import validation_loss
from trainers.evaluation.weights import evaluated_with
from trainers.generators import settle
from trainers.ports import MetricSink
from trainers.state import TrainState
from trainers.step import Task


def evaluate(state: TrainState, task: Task, sink: MetricSink) -> None:
    """Validate and draw samples, if that is due after this step. Collective: all ranks.

    It comes before the save of its step: so a run that is killed on the way does it again, and none is left out.
    """
    config, progress = task.config, state.progress
    validates = config.validation.due(progress.step, config.train.num_steps)
    measures = config.validation.measures(progress.step, config.train.num_steps)
    draws = config.samples.due(progress.step, config.train.num_steps)
    if not (validates or measures or draws):
        return
    begun_s = time.monotonic()
    begun = [RAW, *state.ema.tensors()]
    drawn = [name for name in config.samples.chosen(list(config.ema)) if name in begun] if draws else []
    numbers: dict[str, float] = {}
    for weights in begun if validates or measures else drawn:
        of = "" if weights == RAW else f"/ema/{weights}"
        with evaluated_with(state, weights):
            if validates:
                numbers[f"loss{of}"] = validation_loss(state, task, sink.evaluating)
            if measures:
                found = measure(state, task, sink.evaluating)
                numbers |= {f"{name}{of}": value for name, value in found.items()}
            if weights in drawn:
                grid = draw_grid(state, task, sink.evaluating)
                if state.topology.rank == 0:
                    sink.drew(progress, weights, grid)
    settle(config.seed, progress.step, config.train.num_microbatches)  # as the step has left them
    if numbers:
        sink.validated(progress, numbers)
    sink.evaluated(progress, time.monotonic() - begun_s)
