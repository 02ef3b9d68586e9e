"""One optimizer step, from sample positions to new weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from trainers.conditioning import Condition, call_model
from trainers.config import TrainerConfig
from trainers.data.batch import Batch, load_microbatch
from trainers.data.guarded import GuardedSource
from trainers.data.loader import ReadAhead
from trainers.evaluation.metrics import Networks
from trainers.frozen import Frozen
from trainers.generators import settle
from trainers.integrity import ReplicaCheck
from trainers.norm import StepSums, clip_
from trainers.objectives import Objective
from trainers.parallel import begin_round, drop_gradients
from trainers.recomputation import Made, Recomputation
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
    replicas: ReplicaCheck
    recomputation: Recomputation
    device: torch.device
    null_label: int | None
    """What a dropped label becomes; None: the model takes no labels."""
    validation: GuardedSource | None = None
    """The samples that are held out, if there are any."""
    networks: Networks | None = None
    """What drawn images are compared with these by, if they are."""
    frozen: Frozen | None = None
    """What makes latents of images and embeddings of captions; None: the model takes images and labels as they are."""
    latent_shape: tuple[int, int, int] | None = None
    """(c, h, w) of the latents of square images; None: what the data holds is denoised itself."""
    read_ahead: ReadAhead[Batch] | None = None
    """Reads microbatches before they are due; None: they are read when they are."""

    def leave_out(self, samples: frozenset[int]) -> None:
        """From now on replace these dataset indices, and no others."""
        self.source.leave_out(samples)
        if self.validation is not None:
            self.validation.leave_out(samples)

    @property
    def latent_factor(self) -> tuple[int, int] | None:
        """Channels of the latents, and how many times smaller they are than images; None without a VAE."""
        if self.latent_shape is None:
            return None
        return self.latent_shape[0], self.config.data.image_size // self.latent_shape[1]

    def load(self, source: GuardedSource, step: int, microbatch: int) -> Batch:
        """A microbatch of `step`, counted from 1. Local; in any thread, if `source` is of that thread."""
        train, data = self.config.train, self.config.data
        first = (step - 1) * train.global_batch_size + microbatch * train.microbatch_size
        return load_microbatch(
            source,
            np.arange(first, first + train.microbatch_size),
            seed=self.config.seed,
            augment=data,
            null_label=self.null_label,
            label_drop=self.config.objective.label_drop,
            latent_factor=self.latent_factor,
        )


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
        CorruptionError: gradients made twice differ, or the step is bad and replicas of the state differ.
    """
    train, optimizer = task.config.train, task.config.optimizer
    step = state.progress.step + 1
    task.leave_out(state.exclusions.left_out(step))  # also of a validation after a step that is skipped
    if state.exclusions.skips(step):
        task.trace.leave(())
        _advance(state, task)
        return {"skipped": 1.0}
    losses, broken = task.recomputation.gradients(state, lambda: _gradients(state, task))
    loss, norm, losses = task.sums(losses)
    task.trace.leave(losses.tolist())
    values = {"loss": loss.item(), "grad_norm": norm.item()}
    values["lr"] = learning_rate(task.config.schedule, optimizer.lr, train.num_steps, state.progress.step)
    values |= _report_broken(task, broken)
    reason = state.divergence.judge(step, values)
    if reason is None:
        if optimizer.clip_norm is not None:
            clip_(state.parameters, norm, optimizer.clip_norm)
        _update(state, values["lr"])
        state.ema.update(step)
    else:
        task.replicas.compare(state)  # before data is blamed for what a wrong bit does
        values["skipped"] = 1.0
    drop_gradients(state.parameters)
    _advance(state, task)
    state.divergence.check(step, reason, num_rollbacks=len(state.exclusions.steps))
    return values | _ema_health(state, task)


def _gradients(state: TrainState, task: Task) -> Made:
    """Forward and backward of the whole step."""
    num_microbatches = task.config.train.num_microbatches
    losses, broken = torch.zeros(num_microbatches, device=task.device), list[str]()
    for _ in task.rounds:
        begin_round(state.model, state.parameters, task.config.parallel, task.rounds)
        index = task.rounds.microbatch(state.topology.rank)
        if index is not None:
            losses[index], names = _backward(state, task, index, scale=1.0 / num_microbatches)
            broken += names
        else:
            # The others need this rank's part of the collectives. The tree leaves the gradient out; `fast` adds zeros.
            _backward(state, task, num_microbatches - 1, scale=0.0)
    return losses, broken


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


def _report_broken(task: Task, broken: list[str]) -> dict[str, float]:
    """How many samples of the step were broken, on all ranks; the trace has their names. Collective."""
    if task.config.data.on_broken == "refuse":
        return {}
    count = torch.tensor(float(len(broken)), device=task.device)
    dist.all_reduce(count)
    task.trace.broken = ()
    if count.item():
        parts: list[list[str]] = [[] for _ in range(task.rounds.world_size)]
        dist.all_gather_object(parts, broken)
        task.trace.broken = tuple(sorted({name for part in parts for name in part}))
    return {"data/broken": count.item()}


def _following(state: TrainState, task: Task, index: int) -> Iterator[tuple[int, int]]:
    """Step and microbatch of what this rank works on next, without an end but that of the run."""
    rank, rounds = state.topology.rank, task.rounds
    mine = [m for m in range(rounds.num_microbatches) if rounds.rank_of(m) == rank] or [rounds.num_microbatches - 1]
    for step in range(state.progress.step + 1, task.config.train.num_steps + 1):
        if not state.exclusions.skips(step):
            yield from ((step, m) for m in mine if step > state.progress.step + 1 or m > index)


def _load(state: TrainState, task: Task, index: int) -> Batch:
    step = state.progress.step + 1
    if task.read_ahead is None or task.rounds.shift is not None:  # what is read ahead is what comes in earnest
        return task.load(task.source, step, index)
    batch = task.read_ahead.take(
        (step, index), lambda: task.load(task.source, step, index), _following(state, task, index)
    )
    task.trace.reading(task.source.inside(np.array(batch.indices)).tolist())
    return batch


def _backward(state: TrainState, task: Task, index: int, scale: float) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Forward and backward of one microbatch.

    Returns:
        Its mean loss, a 0-dimensional float32 tensor, and the names of samples that were broken.
    """
    config = task.config
    size = config.train.microbatch_size
    first = state.progress.samples_seen + index * size
    positions = np.arange(first, first + size)
    task.trace.enter(state.progress.step + 1, index, first)
    batch = _load(state, task, index)
    task.trace.computing()
    seed_global_generators(config.seed, state.progress.step, index)
    loss = sample_losses(state.model, task, batch, config.seed, positions).mean()
    (loss * scale).backward()
    return loss.detach(), batch.broken


def sample_losses(model: torch.nn.Module, task: Task, batch: Batch, seed: int, positions: np.ndarray) -> torch.Tensor:
    """The loss of every sample of a batch, (B,) float32. All ranks at once, if the model is sharded.

    Args:
        seed: with `positions`, what the batch was loaded with.
    """
    config, objective = task.config, task.objective
    clean, condition = _inputs(task, batch)
    noise, in_input = (_on(task.device, part) for part in objective.noises(batch.noise, seed, positions))
    timesteps = _on(task.device, objective.timesteps(batch.uniform))
    noisy = objective.noisy(clean, in_input, timesteps)
    if config.train.precision == "bf16":
        noisy, condition = noisy.bfloat16(), condition.cast(torch.bfloat16)
    prediction = call_model(model, noisy, timesteps, condition, with_variance=config.objective.learned_variance)
    return objective.loss(prediction, clean, noise, timesteps)


def _inputs(task: Task, batch: Batch) -> tuple[torch.Tensor, Condition]:
    """What is made noisy, (B, c, h, w) float32, and under which condition; both on the device."""
    images, labels, sizes, posterior = (
        None if value is None else _on(task.device, value)
        for value in (batch.images, batch.labels, batch.sizes, batch.posterior)
    )
    assert images is not None
    if batch.text is not None:
        text = {name: _on(task.device, part) for name, part in batch.text.parts().items()}
        return images, Condition(**text, labels=labels, sizes=sizes, guidance=task.config.conditioning.guidance)
    if task.frozen is None:
        return images, Condition(labels=labels)
    condition = task.frozen.condition(labels, batch.captions, sizes)
    return task.frozen.latents(images, posterior), condition


def _on(device: torch.device, value: torch.Tensor) -> torch.Tensor:
    """`value` on `device`; a GPU takes it when it has done what was asked of it before, and nobody waits for that."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _update(state: TrainState, lr: float) -> None:
    state.take_gradients()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    state.optimizer.step()
    state.optimizer_steps += 1
    for parameter in state.parameters:
        parameter.local.grad = None
