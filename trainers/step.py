"""One optimizer step, from sample positions to new weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainers.conditioning import Condition, call_model
from trainers.config import TrainerConfig
from trainers.data.batch import Batch, load_microbatch
from trainers.data.guarded import GuardedSource
from trainers.frozen import FrozenParts
from trainers.generators import settle
from trainers.norm import StepSums, clip_
from trainers.objectives import Objective
from trainers.parallel import begin_round
from trainers.reduction import Rounds
from trainers.rng import seed_global_generators
from trainers.schedules import learning_rate
from trainers.state import TrainState
from trainers.trace import StepTrace


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on what: fixed for the life of a training process."""

    config: TrainerConfig
    source: GuardedSource
    trace: StepTrace
    objective: Objective
    rounds: Rounds
    sums: StepSums
    device: torch.device
    null_label: int | None
    """What a dropped label becomes; None: the model takes no labels."""
    validation: GuardedSource | None = None
    """The samples that are held out, if there are any."""
    frozen: FrozenParts | None = None
    """What makes latents of images and embeddings of captions; None: the model takes images and labels as they are."""
    latent_shape: tuple[int, int, int] | None = None
    """(c, h, w) of the latents; None: the images themselves are denoised."""


def train_step(state: TrainState, task: Task) -> dict[str, float]:
    """Train on the next global batch and advance `state.progress`. Collective: all ranks.

    A bad step (see `trainers.divergence`) makes no update, and neither does one that `state.exclusions` skip: data and
    the clock, and so the learning rate's schedule, go on; weights, optimizer, EMA and their counters stay.

    Returns:
        loss, grad_norm, lr, and every `train.ema_health_every` steps the health of each EMA profile that has begun; the
        same bits on all ranks and for every world size. `skipped`: 1 if no update was made; a step that the exclusions
        skip has nothing else.

    Raises:
        DivergedError: too many bad steps in a row.
    """
    train, optimizer = task.config.train, task.config.optimizer
    step = state.progress.step + 1
    if state.exclusions.skips(step):
        task.trace.leave(())
        _advance(state, task)
        return {"skipped": 1.0}
    left_out = state.exclusions.left_out(step)
    task.source.leave_out(left_out)
    if task.validation is not None:
        task.validation.leave_out(left_out)
    losses = torch.zeros(train.num_microbatches, device=task.device)
    for _ in task.rounds:
        begin_round(state.model, task.config.parallel, task.rounds)
        index = task.rounds.microbatch(state.topology.rank)
        if index is not None:
            losses[index] = _backward(state, task, index, scale=1.0 / train.num_microbatches)
        else:
            # The others need this rank's part of the collectives. The tree leaves the gradient out; `fast` adds zeros.
            _backward(state, task, train.num_microbatches - 1, scale=0.0)
    loss, norm, losses = task.sums(losses)
    task.trace.leave(losses.tolist())
    values = {"loss": loss.item(), "grad_norm": norm.item()}
    values["lr"] = learning_rate(task.config.schedule, optimizer.lr, train.num_steps, state.progress.step)
    reason = state.divergence.judge(step, values)
    if reason is None:
        if optimizer.clip_norm is not None:
            clip_(state.parameters, norm, optimizer.clip_norm)
        _update(state, values["lr"])
        state.ema.update(step)
    else:
        values["skipped"] = 1.0
    for parameter in state.parameters:
        parameter.parameter.grad = None
    _advance(state, task)
    state.divergence.check(step, reason, num_rollbacks=len(state.exclusions.steps))
    return values | _ema_health(state, task)


def _advance(state: TrainState, task: Task) -> None:
    state.progress = state.progress.advance(task.config.train.global_batch_size)
    settle(task.config.seed, state.progress.step, task.config.train.num_microbatches)


def _ema_health(state: TrainState, task: Task) -> dict[str, float]:
    """Relative distance to the weights, which grows from 0 and levels off; missed updates, 0 but for skipped steps."""
    step, every = state.progress.step, task.config.train.ema_health_every
    averages = state.ema.tensors()
    if every is None or step % every or not averages:
        return {}
    distances = {f"ema/{name}/distance": value for name, value in task.sums.distances(averages).items()}
    return distances | {f"ema/{name}/missed_updates": n for name, n in state.ema.missed_updates(step).items()}


def _backward(state: TrainState, task: Task, index: int, scale: float) -> torch.Tensor:
    """Forward and backward of one microbatch. Returns its mean loss, a 0-dimensional float32 tensor."""
    config = task.config
    size = config.train.microbatch_size
    first = state.progress.samples_seen + index * size
    positions = np.arange(first, first + size)
    task.trace.enter(state.progress.step + 1, index, first)
    batch = load_microbatch(
        task.source,
        positions,
        seed=config.seed,
        flip=config.data.flip,
        null_label=task.null_label,
        label_drop=config.objective.label_drop,
        latent_shape=task.latent_shape,
    )
    task.trace.computing()
    seed_global_generators(config.seed, state.progress.step, index)
    loss = sample_losses(state.model, task, batch, config.seed, positions).mean()
    (loss * scale).backward()
    return loss.detach()


def sample_losses(model: torch.nn.Module, task: Task, batch: Batch, seed: int, positions: np.ndarray) -> torch.Tensor:
    """The loss of every sample of a batch, (B,) float32. All ranks at once, if the model is sharded.

    Args:
        seed: with `positions`, what the batch was loaded with.
    """
    config, objective = task.config, task.objective
    clean, condition = _inputs(task, batch)
    noise, in_input = (part.to(task.device) for part in objective.noises(batch.noise, seed, positions))
    timesteps = objective.timesteps(batch.uniform).to(task.device)
    noisy = objective.noisy(clean, in_input, timesteps)
    if config.train.precision == "bf16":
        noisy, condition = noisy.bfloat16(), condition.cast(torch.bfloat16)
    prediction = call_model(model, noisy, timesteps, condition, with_variance=config.objective.learned_variance)
    return objective.loss(prediction, clean, noise, timesteps)


def _inputs(task: Task, batch: Batch) -> tuple[torch.Tensor, Condition]:
    """What is made noisy, (B, c, h, w) float32, and under which condition; both on the device."""
    images, labels, sizes, posterior = (
        None if value is None else value.to(task.device)
        for value in (batch.images, batch.labels, batch.sizes, batch.posterior)
    )
    assert images is not None
    if task.frozen is None:
        return images, Condition(labels=labels)
    return task.frozen.latents(images, posterior), task.frozen.condition(labels, batch.captions, sizes)


def _update(state: TrainState, lr: float) -> None:
    for parameter in state.parameters:
        parameter.local.grad = parameter.local_grad()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.step()
    state.optimizer_steps += 1
    for parameter in state.parameters:
        parameter.local.grad = None
