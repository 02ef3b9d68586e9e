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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune

from orchestrator.config import RunConfig, to_yaml
from orchestrator.driver import connect_ray
from orchestrator.errors import HOPELESS_CODES

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
    """
    first = configs[0]
    cpus = (concurrent or len(configs)) * first.max_workers * first.resources.cpu
    connect_ray(first, min(cpus, os.cpu_count() or 1), logging.ERROR)
    try:
        room = _room(first)
        show(f"{len(configs)} trials, {concurrent or room} at a time")
        os.environ |= _QUIET_TUNE
        texts = {config.run.name: to_yaml(config) for config in configs}
        trial = ray.tune.with_parameters(_trial, texts=texts, folder=os.getcwd())
        with tempfile.TemporaryDirectory(prefix="unbroken-sweep-") as scratch:
            tuner = ray.tune.Tuner(
                # The workers ask Ray for their share themselves; who waits for them needs no CPU.
                ray.tune.with_resources(trial, {"CPU": 0, "memory": 2**20}),
                param_space={"name": ray.tune.grid_search(list(texts))},
                tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent or room),
                run_config=ray.tune.RunConfig(
                    storage_path=scratch,
                    failure_config=ray.tune.FailureConfig(max_failures=_RESTARTS),
                    callbacks=[_Lines(show)],
                    verbose=0,
                ),
            )
            return {(result.config or {})["name"]: _said(result) for result in tuner.fit()}
    finally:
        ray.shutdown()


def _said(result: Any) -> str:
    if result.error is not None:
        return f"lost too often: {str(result.error).splitlines()[-1]}"
    return (result.metrics or {}).get("said", "")


def _trial(settings: dict[str, Any], texts: dict[str, str], folder: str) -> None:
    """In an actor of Tune, on any node: train one run, in a process.

    Args:
        texts: the config of each run.
        folder: where the search was started; paths in a config are relative to it.
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
        said = ""
        try:
            for line in process.stdout:
                said = line.strip() or said
        finally:
            process.terminate()  # if this actor is told to end: the run saves, and can go on
            code = process.wait()
    if code not in (0, *HOPELESS_CODES):
        raise RuntimeError(f"exit code {code}: {said}")  # Tune starts it again
    ray.tune.report({"said": said})


class _Lines(ray.tune.Callback):
    """A line when a trial begins, fails or ends."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(f"{trial.config['name']}: begins, or goes on")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(f"{trial.config['name']}: {trial.last_result.get('said', 'ended')}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(f"{trial.config['name']}: lost, starts again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(f"{trial.config['name']}: lost too often")


def _room(config: RunConfig) -> int:
    """How many runs of this size the cluster takes at once."""
    has, resources = ray.cluster_resources(), config.resources
    rooms = [
        int(has.get(kind, 0.0) / (asked * config.min_workers))
        for kind, asked in (("CPU", resources.cpu), ("GPU", resources.gpu))
        if asked
    ]
    return max(1, min(rooms, default=1))
