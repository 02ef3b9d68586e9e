"""The measured program on our side without Ray: `torchrun --nproc-per-node W -m bench.under_torchrun CONFIG.json`.

What `python -m trainers` does, but that it prints a JSON line a step. The config may be that of a whole run; only what
`trainers` knows is taken from it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist

from bench.lines import say
from bench.workload import pin
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.loop import train
from trainers.ports import Unsaved
from trainers.progress import Progress


class _Ports(Unsaved):
    """Control, checkpointer and metrics of a run that nobody keeps."""

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        say("step", step=progress.step)

    def evaluating(self) -> None:
        pass

    def validated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        pass

    def drew(self, progress: Progress, weights: str, png: bytes) -> None:
        pass

    def evaluated(self, progress: Progress, seconds: float) -> None:
        pass


def main() -> None:
    content = json.loads(Path(sys.argv[1]).read_text())
    known = {field.name for field in fields(TrainerConfig)}
    config = decode(TrainerConfig, {key: value for key, value in content.items() if key in known})
    torch.set_num_threads(1)
    pin(int(os.environ["RANK"]))
    dist.init_process_group("gloo")
    state, task = build(config, torch.device("cpu"))
    ports = _Ports()
    train(state, task, ports, ports, ports)


if __name__ == "__main__":
    main()
