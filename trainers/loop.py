"""The training loop: a function from a state to a later state."""

from __future__ import annotations

from trainers.evaluation.evaluate import evaluate
from trainers.ports import Checkpointer, Control, MetricSink
from trainers.state import TrainState
from trainers.step import Task, train_step


def train(state: TrainState, task: Task, control: Control, checkpointer: Checkpointer, sink: MetricSink) -> None:
    """Restore the newest stable checkpoint, if there is one, and train to the end. Collective: all ranks.

    Returns when `train.num_steps` are done, or when `control` says stop; everything asked to be saved is committed.

    Raises:
        DivergedError: too many bad steps in a row; the state is of no use any more.
        CorruptionError: replicas of the state differ; it is of no use any more.
    """
    checkpointer.restore(state)
    task.replicas.compare(state)
    while state.progress.step < task.config.train.num_steps:
        metrics = train_step(state, task)
        sink.log(state.progress, metrics)
        evaluate(state, task, sink)
        directive = control.poll(state.progress)
        if directive.save or task.replicas.is_due(state.progress.step):
            task.replicas.compare(state)  # before the save: what is saved may be gone on from
        if directive.save:
            checkpointer.save(state)
        if directive.stop:
            break
    checkpointer.wait()
