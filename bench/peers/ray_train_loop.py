"""Plain Ray Train with torch's distributed checkpoint: `python -m bench.peers.ray_train_loop CONFIG.json FOLDER EVERY`.

The loop is that of `dcp_loop`; Ray Train restarts its workers whenever one dies, with its settings as they are. What
the workers say is passed on through a named pipe, as Ray marks what they print.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer


def main() -> None:
    config, folder, every = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).absolute(), int(sys.argv[3])
    fit(_work, config, folder, {"every": every}, TorchConfig())


def fit(
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    folder: Path,
    arguments: dict[str, Any],
    backend: TorchConfig,
) -> None:
    """Let Ray Train call `work({"config": config, "folder": folder, **arguments})` on all workers, without end."""
    os.mkfifo(folder / "lines")
    threading.Thread(target=_pass_on, args=(folder / "lines",), daemon=True).start()
    # Not whatever cluster happens to run here.
    ray.init("local", num_cpus=config["workers"], include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config, "folder": str(folder), **arguments},
        torch_config=backend,
        scaling_config=ray.train.ScalingConfig(num_workers=config["workers"]),
        run_config=ray.train.RunConfig(
            name="plain",
            storage_path=str(folder / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
        ),
    )
    trainer.fit()


def speak(folder: str) -> None:
    """Let the driver pass on what this worker says."""
    os.dup2(os.open(Path(folder) / "lines", os.O_WRONLY), 1)


def _work(arguments: dict[str, Any]) -> None:
    from bench.lines import say
    from bench.peers.dcp_loop import train

    speak(arguments["folder"])
    say("imported", pid=os.getpid())
    train(arguments["config"], Path(arguments["folder"]), arguments["every"])


def _pass_on(fifo: Path) -> None:
    with os.fdopen(os.open(fifo, os.O_RDWR), "rb") as lines:  # O_RDWR: there is no end when a worker dies
        for line in lines:
            os.write(1, line)


if __name__ == "__main__":
    main()
