"""Training without Ray, storage or tracking: `torchrun --nproc-per-node 2 -m trainers CONFIG.json [--out FOLDER]`.

The same numbers as under `unbroken train`: the last line is the fingerprint of the final state. Nothing is saved on the
way; a run that is to survive failures is started with `unbroken train`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError, CorruptionError, DivergedError
from trainers.export import ExportWeights, export_pipeline
from trainers.loop import train
from trainers.parallel import gather_rows, kept_buffers
from trainers.ports import Unsaved
from trainers.progress import Progress
from trainers.state import TrainState, combined_fingerprint, fingerprints


class _Print:
    """Rank 0 prints a line a step, at most one in two seconds, and writes what was drawn beside the folder `out`."""

    def __init__(self, config: TrainerConfig, out: Path | None) -> None:
        self._config = config
        self._out = out
        self._last_s = 0.0
        self._start_s = time.monotonic()

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if dist.get_rank() or (now - self._last_s < 2 and progress.step != self._config.train.num_steps):
            return
        self._last_s = now
        rate = progress.samples_seen / (now - self._start_s)
        total = self._config.train.num_steps
        print(f"step {progress.step}/{total}  loss {metrics['loss']:.4f}  {rate:.0f} samples/s", flush=True)

    def evaluating(self) -> None:
        pass

    def validated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        if dist.get_rank() == 0:
            values = "  ".join(f"validation/{name} {value:.4f}" for name, value in metrics.items())
            print(f"step {progress.step}  {values}", flush=True)

    def drew(self, progress: Progress, weights: str, png: bytes) -> None:
        assert self._out is not None
        # Not into it: what is exported there at the end is a folder of its own.
        path = self._out.with_name(f"{self._out.name}-samples") / weights / f"{progress.step:09d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        print(f"step {progress.step}  samples drawn: {path}", flush=True)

    def evaluated(self, progress: Progress, seconds: float) -> None:
        pass


def _write_weights(state: TrainState, config: TrainerConfig, out: Path) -> None:
    """Export the first EMA profile, or the raw weights, as a diffusers folder. Collective: all ranks."""
    profile, averages = next(iter(state.ema.tensors().items()), (None, None))
    whole = {
        parameter.name: gather_rows(
            averages[parameter.name] if averages else parameter.local, parameter, state.topology
        ).cpu()
        for parameter in state.parameters
    }
    if dist.get_rank() == 0:
        description = f"EMA profile {profile}" if profile else "raw weights"
        buffers = {name: value.cpu() for name, value in kept_buffers(state.model).items()}
        export_pipeline(
            out,
            config,
            [ExportWeights(tensors={**buffers, **whole}, description=description)],
            origin=f"python -m trainers, step {state.progress.step}",
        )
        print(f"{description} written to {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainers", description=__doc__)
    parser.add_argument("config", help="JSON file, as `unbroken config show CONFIG --trainers-only --json` prints it")
    parser.add_argument(
        "--out",
        type=Path,
        help="write the trained weights into this new folder, as diffusers has it; samples to OUT-samples",
    )
    arguments = parser.parse_args()
    try:
        config = decode(TrainerConfig, json.loads(Path(arguments.config).read_text(encoding="utf-8")))
    except (ConfigError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    if config.samples.every_steps is not None and not arguments.out:
        parser.exit(2, "error: samples.every_steps needs --out, the folder for the images; or set it to null\n")
    out = arguments.out and arguments.out.resolve()
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):  # now, not when all is trained
        parser.exit(2, f"error: --out {arguments.out} is not an empty folder; remove it, or name another\n")
    torch.set_num_threads(config.parallel.cpu_threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        state, task = build(config, device)
        unsaved = Unsaved()
        train(state, task, unsaved, unsaved, _Print(config, out))
        state.generators.capture()
        combined = combined_fingerprint(fingerprints(state))
        if dist.get_rank() == 0:
            print(f"fingerprint of the state after step {state.progress.step}: {combined}", flush=True)
        if out:
            _write_weights(state, config, out)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    except DivergedError as error:
        parser.exit(3, f"error: training diverged: {error}; `unbroken train` would roll back\n")
    except CorruptionError as error:
        parser.exit(3, f"error: {error}; `unbroken train` would go back to the newest checkpoint\n")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
