"""Plain Ray Train with torch's distributed checkpoint: `python -m bench.peers.ray_train_loop CONFIG.json FOLDER EVERY`.

The loop is that of `dcp_loop`; Ray Train restarts its workers whenever one dies, with its settings as they are. What
the workers say is passed on through a named pipe, as Ray marks what they print.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer


def main() -> None:
    config, folder, every = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).absolute(), int(sys.argv[3])
    os.mkfifo(folder / "lines")
    threading.Thread(target=_pass_on, args=(folder / "lines",), daemon=True).start()
    # Not whatever cluster happens to run here.
    ray.init("local", num_cpus=config["workers"], include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config, "folder": str(folder), "every": every},
        scaling_config=ray.train.ScalingConfig(num_workers=config["workers"]),
        run_config=ray.train.RunConfig(
            name="plain",
            storage_path=str(folder / "ray-train"),
            failure_config=ray.train.FailureConfig(max_failures=-1),
        ),
    )
    trainer.fit()


def _work(arguments: dict[str, Any]) -> None:
    from bench.lines import say
    from bench.peers.dcp_loop import train

    folder = Path(arguments["folder"])
    os.dup2(os.open(folder / "lines", os.O_WRONLY), 1)
    say("imported", pid=os.getpid())
    train(arguments["config"], folder, arguments["every"])


def _pass_on(fifo: Path) -> None:
    with os.fdopen(os.open(fifo, os.O_RDWR), "rb") as lines:  # O_RDWR: there is no end when a worker dies
        for line in lines:
            os.write(1, line)


if __name__ == "__main__":
    main()
