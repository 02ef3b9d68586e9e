"""The driver: opens the run, has Ray Train place the agents, tells the user what happens, and interprets the end."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from orchestrator.checkpoint.attempts import newest_attempt
from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.keys import CONFIG
from orchestrator.checkpoint.run_record import RunRecord, open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig, run_url, to_dict, to_yaml, trainer_dict
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.data.files import with_absolute_paths
from orchestrator.errors import (
    AlreadyExistsError,
    GaveUpError,
    StorageError,
    SupersededError,
    UnbrokenError,
)
from orchestrator.interrupts import Interrupts
from orchestrator.messages.attempts import Ending, Event
from orchestrator.run_identity import check_same_run, config_hash
from orchestrator.sections import Workers
from orchestrator.tracking.recorder import Recorder
from trainers.errors import ConfigError

# Ray reads these when it is imported or when a worker group starts. Each moved a measured recovery time.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a dead agent is seen in 0.1 s instead of 1.5 s
os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "60")  # if even the hub's heartbeat sees nothing
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # `NodeWatch` looks; this is a process a restart

import ray
import ray.train

from orchestrator.agents.agent import agent
from orchestrator.cluster.control import Listener, NodeWatch
from orchestrator.cluster.joining import join, start_here
from orchestrator.cluster.keepers import Keepers
from orchestrator.cluster.mailbox import make_mailbox, send_order
from orchestrator.cluster.peer_memory import start_directory
from orchestrator.cluster.placing import Replacing, Trainer, live_nodes, why_given_up
from orchestrator.run_spec import RunSpec
from orchestrator.tracking.fan_out import FanOut, check_tracking

_MAX_CONTROLLER_DEATHS = 5
"""Times in a row that Ray Train's controller may die without a newer checkpoint."""

_Tell = Callable[[Event], None]

_ERRORS = {
    Ending.GAVE_UP: GaveUpError,
    Ending.CONFIG: ConfigError,
    Ending.SUPERSEDED: SupersededError,
    Ending.STORAGE: StorageError,
    Ending.BROKEN: RuntimeError,
}


def run(config: RunConfig, show: _Tell, more_preload: Sequence[str] = ()) -> None:
    """Train until the run of this configuration is finished; continue it if it has begun.

    Args:
        show: told every event, in order, from a thread.
        more_preload: modules that every trainer imports too, as for `ForkServer`.

    Raises:
        RunMismatchError: a run of this name exists with another configuration.
        GaveUpError, ConfigError, SupersededError, StorageError: the run ended before its last step.
        UnbrokenError: Ray Train itself failed again and again.
    """
    check_tracking(config.tracking)
    store = Store.open(run_url(config))
    spec = _spec(config, _open_run(store, config).run_id, newest_attempt(store), more_preload)
    fan_out = FanOut(show)
    recorder = Recorder(spec.run_url, spec.session, report=fan_out.take)

    def note(event: Event) -> None:
        fan_out.take(event)
        recorder.take(event)

    try:
        _go_on(config, spec, fan_out, note)
    finally:
        recorder.close()


def _spec(config: RunConfig, run_id: str, attempts_before: int, more_preload: Sequence[str]) -> RunSpec:
    return RunSpec(
        run_id=run_id,
        run_url=run_url(config),
        session=uuid.uuid4().hex,
        attempts_before=attempts_before,
        config=trainer_dict(with_absolute_paths(config)),
        config_hash=config_hash(config),
        strategy=config.parallel.strategy,
        checkpoint=config.checkpoint,
        num_steps=config.train.num_steps,
        versions=versions(),
        preload=(*preload(config), *more_preload),
        watchdog=config.watchdog,
        failures=config.failures,
        rollback_steps=config.rollback_steps,
        quarantine=config.data.quarantine,
    )


def _go_on(config: RunConfig, spec: RunSpec, fan_out: FanOut, note: _Tell) -> None:
    """Args: note: as `fan_out.take`, for events that only this process can record."""
    newest = newest_stable(Store.open(spec.run_url))
    if newest is not None and newest.manifest and newest.manifest.progress.step >= config.train.num_steps:
        note(_event("already_finished", step=newest.manifest.progress.step, checkpoint=str(newest.ref)))
        return
    facts = {"num_steps": spec.num_steps, "workers": to_dict(config)["workers"], "versions": dict(spec.versions)}
    note(_event("started", host=platform.node(), pid=os.getpid(), system=platform.platform(), **facts))
    connect_ray(config)
    # After Ray has set its own handler, which would abort with a stack dump.
    with Interrupts(config.run.grace_s) as interrupts:
        try:
            fan_out.open(config, spec)
            outcome = _supervise(config, spec, fan_out.take, note, interrupts)
            if Ending(outcome["ending"]) is not Ending.STOPPED:  # the grace time is not for uploads: they go on alone
                fan_out.close()
        except SystemExit:  # who catches it is to `leave`: threads of ours may still be asking Ray something
            note(_event("interrupted", kept=""))
            raise
        except BaseException:
            ray.shutdown()
            raise
    ending, message = Ending(outcome["ending"]), outcome["message"]
    if ending is Ending.STOPPED:
        note(_event("interrupted", kept=message))
        raise SystemExit(interrupts.exit_code)
    ray.shutdown()
    if ending is not Ending.FINISHED:
        raise _ERRORS[ending](message)


def _open_run(store: Store, config: RunConfig) -> RunRecord:
    record = open_or_create(store, to_dict(config))
    check_same_run(store, record, config)
    with suppress(AlreadyExistsError):  # for people; what counts is in the run record
        store.create(CONFIG, to_yaml(config).encode())
    return record


def preload(config: RunConfig) -> tuple[str, ...]:
    """What a trainer of this configuration imports: paid once by the fork server, not at every restart."""
    modules = ["torch", "trainers.build", "orchestrator.checkpoint.reader"]
    modules += config.model.classes()
    if config.conditioning.text_encoder is not None:
        modules += ["transformers:AutoTokenizer", "transformers:AutoModelForTextEncoding"]
    if config.data.source == "digits":
        modules.append("sklearn.datasets")
    return tuple(modules)


def versions() -> dict[str, str]:
    """Of what decides numbers: the contract holds for equal versions."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")}
    return {"python": platform.python_version(), **found, "machine": platform.machine()}


def _event(kind: str, /, **fields: Any) -> Event:
    return Event(kind=kind, fields=fields, time_s=time.time())


def connect_ray(config: RunConfig, num_cpus: float | None = None, logging_level: int = logging.WARNING) -> None:
    """Join the cluster of RAY_ADDRESS, or start one of this machine alone.

    Args:
        num_cpus: of our own cluster, if `config` does not need more; None: those of this machine.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        join(address, logging_level)
        return
    needed = config.max_workers * config.resources.cpu
    start_here(int(max(needed + 0.999, (os.cpu_count() or 1) if num_cpus is None else num_cpus)), logging_level)


def _supervise(config: RunConfig, spec: RunSpec, show: _Tell, note: _Tell, interrupts: Interrupts) -> dict[str, Any]:
    """Call Ray Train until the coordinator reports an outcome; Ray restarts agents and nodes by itself."""
    deaths, stalled_at = 0, None
    keepers = Keepers(spec.session, spec.preload, _resources(config), config.max_workers)
    keepers.tend(live_nodes(), ())
    directory = start_directory(config.resources.cpu) if config.checkpoint.peer else None
    if config.resources.gpu:  # NCCL's own word on a collective that is stuck, in Ray's log; it observes only
        os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
    if isinstance(config.workers, Workers):
        # After that the number of workers is chosen anew. A fixed number may have to wait for machines to boot.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
    while True:
        mailbox = make_mailbox()
        listener = Listener(mailbox, show)
        most = config.max_workers if isinstance(config.workers, Workers) else 0
        nodes = NodeWatch(listener, partial(send_order, mailbox), most, _resources(config), keepers, note)
        trainer = _trainer(spec, config, {"mailbox": mailbox, "directory": directory})
        error = _fit(trainer, interrupts, listener, mailbox)
        nodes.close()
        outcome = listener.finish()
        if outcome is not None:
            return outcome
        if (why := why_given_up(error, config.failures.agents)) is not None:
            raise GaveUpError(why)
        step = _newest_step(spec)
        deaths = deaths + 1 if step == stalled_at else 1
        stalled_at = step
        reason = (
            f"Ray Train ended without an outcome: {type(error).__name__}: {str(error).splitlines()[0] if error else ''}"
        )
        if deaths >= _MAX_CONTROLLER_DEATHS:
            raise UnbrokenError(f"{reason}; {deaths} times in a row without a newer checkpoint. Ray's logs say more")
        note(_event("controller_lost", reason=reason))
        time.sleep(min(10.0, 0.5 * 2**deaths))


def _newest_step(spec: RunSpec) -> int | None:
    """Of the newest stable checkpoint; None: there is none, or storage does not say, which ends no run."""
    try:
        newest = newest_stable(Store.open(spec.run_url))
    except UnbrokenError:
        return None
    return newest.step if newest is not None else None


def _fit(trainer: Trainer, interrupts: Interrupts, listener: Listener, mailbox: Any) -> Exception | None:
    """Run Ray Train to its end; what ended it before the train function returned, if anything did.

    In a thread: there Ray leaves signals alone, and this one is free to be interrupted.

    Raises:
        SystemExit: a signal came, and there was nothing to save, or the grace time is over.
    """
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # whatever ended Ray's controller: the run itself can go on
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    ordered = False
    while thread.is_alive():
        thread.join(0.2)
        if interrupts.name is None:
            continue
        if interrupts.overdue or not (ordered or listener.nodes):
            raise SystemExit(interrupts.exit_code)
        if not ordered:
            send_order(mailbox, HaltOrder(purpose=Purpose.END, reason=interrupts.name))
            ordered = True
    return errors[0] if errors else None


def _trainer(spec: RunSpec, config: RunConfig, actors: dict[str, Any]) -> Trainer:
    workers = (config.workers.min, config.workers.max) if isinstance(config.workers, Workers) else config.workers
    return Trainer(
        agent,
        actors["mailbox"],
        config.failures.agents,
        train_loop_config={"spec": spec, **actors},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=config.resources.gpu > 0, resources_per_worker=_resources(config)
        ),
        run_config=ray.train.RunConfig(
            # Ray gets no checkpoints to index and needs a folder only for its own marker.
            name=f"{config.run.name}-{spec.session[:8]}",
            storage_path=os.path.join(tempfile.gettempdir(), f"unbroken-ray-train-{os.getuid()}"),
            callbacks=[Replacing(actors["mailbox"])],  # pyright: ignore[reportArgumentType] # it takes Ray's own kinds
            failure_config=ray.train.FailureConfig(
                max_failures=-1, controller_failure_limit=-1, max_preemption_failures=-1
            ),
        ),
    )


def _resources(config: RunConfig) -> dict[str, float]:
    """What one worker asks for, in Ray's words."""
    return {"CPU": config.resources.cpu, **({"GPU": config.resources.gpu} if config.resources.gpu else {})}
