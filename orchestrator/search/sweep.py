"""Trials of a search, several at a time, on Ray Tune.

A trial is `unbroken train` in a process of its own, so it restarts as every run does. Tune places the trials, limits
how many there are at a time, and starts one anew whose process or node was lost: the same command, which goes on.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune

from orchestrator.cluster.mailbox import make_mailbox, send_order, take_orders
from orchestrator.config import RunConfig, to_yaml
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.driver import connect_ray
from orchestrator.errors import HOPELESS_CODES
from orchestrator.interrupts import Interrupts

_RESTARTS = 5
# The lines are ours to write, results are read from the runs, and Ctrl-C is the caller's.
_QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_OF_THE_WORKER = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_WORKER_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR")


def run_trials(configs: Sequence[RunConfig], concurrent: int | None, show: Callable[[str], None]) -> dict[str, str]:
    """Train every one of `configs`, which differ in `run.name`, to its end.

    Args:
        concurrent: trials at a time; None: as many as the cluster has room for.
        show: told when a trial begins and ends.

    Returns:
        By name of the run, the last line that its training said.

    Raises:
        SystemExit: a signal came; the trials under way have saved, or the grace time is over. Who catches it is to
            `leave`: a thread still asks Ray something.
    """
    first = configs[0]
    cpus = (concurrent or len(configs)) * first.max_workers * first.resources.cpu
    connect_ray(first, min(cpus, os.cpu_count() or 1), logging.ERROR)
    # After Ray has set its own handler, which would abort with a stack dump.
    scratch = tempfile.TemporaryDirectory(prefix="unbroken-sweep-", ignore_cleanup_errors=True)
    with Interrupts(first.run.grace_s) as interrupts, scratch as folder:
        try:
            concurrent = concurrent or _room(first)
            show(f"{len(configs)} trials, {concurrent} at a time")
            lines, mailbox = _Lines(show), make_mailbox()
            said = _fit(_tuner(configs, concurrent, folder, lines, mailbox), interrupts, lines, mailbox)
        except Exception:
            ray.shutdown()
            raise
        ray.shutdown()
        return said


def _tuner(configs: Sequence[RunConfig], concurrent: int, folder: str, lines: _Lines, mailbox: Any) -> ray.tune.Tuner:
    os.environ |= _QUIET_TUNE
    texts = {config.run.name: to_yaml(config) for config in configs}
    trial = ray.tune.with_parameters(_trial, texts=texts, folder=os.getcwd(), mailbox=mailbox)
    return ray.tune.Tuner(
        # The workers ask Ray for their share themselves; who waits for them needs no CPU.
        ray.tune.with_resources(trial, {"CPU": 0, "memory": 2**20}),
        param_space={"name": ray.tune.grid_search(list(texts))},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=ray.tune.RunConfig(
            storage_path=folder,
            failure_config=ray.tune.FailureConfig(max_failures=_RESTARTS),
            callbacks=[lines],
            verbose=0,
        ),
    )


def _fit(tuner: ray.tune.Tuner, interrupts: Interrupts, lines: _Lines, mailbox: Any) -> dict[str, str]:
    """Run the trials, in a thread: this one is free to be interrupted."""
    results: list[Any] = []
    errors: list[Exception] = []

    def fit() -> None:
        try:
            grid = tuner.fit()
            results.extend(grid[index] for index in range(len(grid)))
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=fit, name="tune", daemon=True)
    thread.start()
    halted: set[str] | None = None
    while thread.is_alive():
        thread.join(0.2)
        if interrupts.name is None:
            continue
        if halted is None:
            halted = lines.running
            send_order(mailbox, HaltOrder(purpose=Purpose.END, reason=interrupts.name))
        if interrupts.overdue or not halted & lines.running:
            lines.show(f"{interrupts.name}: the trials under way are stopped; the same command goes on with the search")
            raise SystemExit(interrupts.exit_code)
    if errors:
        raise errors[0]
    return {(result.config or {})["name"]: _said(result) for result in results}


def _said(result: Any) -> str:
    if result.error is not None:
        return f"lost too often: {str(result.error).splitlines()[-1]}"
    return (result.metrics or {}).get("said", "")


def _trial(settings: dict[str, Any], texts: dict[str, str], folder: str, mailbox: Any) -> None:
    """In an actor of Tune, on any node: train one run, in a process.

    Args:
        texts: the config of each run.
        folder: where the search was started; paths in a config are relative to it.
        mailbox: has an order when the search is to stop: the run saves, and can go on.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_WORKER}
    environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory(prefix="unbroken-trial-") as scratch:
        path = Path(scratch, "config.yaml")
        path.write_text(texts[settings["name"]], encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "train", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder if os.path.isdir(folder) else None,
        )
        assert process.stdout is not None
        said, halted = "", threading.Event()

        def halt(_: HaltOrder) -> None:
            halted.set()
            process.terminate()

        try:
            take_orders(mailbox, halt)
            for line in process.stdout:
                said = line.strip() or said
        finally:
            process.terminate()  # whatever ends this actor
            code = process.wait()
    if code not in (0, *HOPELESS_CODES) and not halted.is_set():
        raise RuntimeError(f"exit code {code}: {said}")  # Tune starts it again
    ray.tune.report({"said": said})


class _Lines(ray.tune.Callback):
    """A line when a trial begins, fails or ends."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self.running: set[str] = set()
        """Names of the runs under way."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._begins(trial.config["name"], "begins, or goes on")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ends(trial.config["name"], trial.last_result.get("said", "ended"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ends(trial.config["name"], "lost, starts again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ends(trial.config["name"], "lost too often")

    def _begins(self, name: str, line: str) -> None:
        self.running = self.running | {name}
        self.show(f"{name}: {line}")

    def _ends(self, name: str, line: str) -> None:
        self.running = self.running - {name}
        self.show(f"{name}: {line}")


def _room(config: RunConfig) -> int:
    """How many runs of this size the cluster takes at once."""
    has, resources = ray.cluster_resources(), config.resources
    rooms = [
        int(has.get(kind, 0.0) / (asked * config.min_workers))
        for kind, asked in (("CPU", resources.cpu), ("GPU", resources.gpu))
        if asked
    ]
    return max(1, min(rooms, default=1))
