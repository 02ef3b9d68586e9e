"""The bare loop with torch's distributed checkpoint: what one writes to survive failures with torch alone.

`torchrun --nproc-per-node W --max-restarts N -m bench.peers.dcp_loop CONFIG.json FOLDER EVERY`: every so many steps it
saves model, optimizer and EMA with `dcp.save`, which it waits for, and starts from the newest whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bench.bare_loop import BareLoop, join
from bench.lines import say
from bench.workload import pin


def main() -> None:
    config, folder, every = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3])
    say("imported", pid=os.getpid())
    join()
    train(config, folder, every)


def train(config: dict[str, Any], folder: Path, every: int) -> None:
    """Train for ever, from the newest checkpoint in `folder`. Collective: all ranks, in a process group."""
    torch.set_num_threads(1)
    pin(int(os.environ["RANK"]))
    say("process group")
    loop = BareLoop(config, ema=True)
    say("built")
    step = _load(loop, folder)
    say("restored", step=step)
    while True:
        loop.step()
        step += 1
        say("step", step=step)
        if step % every == 0:
            began = time.monotonic()
            _save(loop, folder, step)
            say("saved", step=step, seconds=time.monotonic() - began)


def _state(loop: BareLoop) -> dict[str, Any]:
    model, optimizer = get_state_dict(loop.model, loop.optimizer)
    # A key of its own for each rank: under one key DCP takes plain tensors for copies, and keeps one.
    ema = {f"{dist.get_rank()}/{index}": average for index, average in enumerate(loop.averages)}
    return {"model": model, "optimizer": optimizer, "ema": ema}


def _save(loop: BareLoop, folder: Path, step: int) -> None:
    """Collective: all ranks. What is being written has another name until it is whole."""
    names = [f"unfinished-{time.time_ns()}"]  # not one that a killed life has left
    dist.broadcast_object_list(names)
    unfinished = folder / names[0]
    dcp.save(_state(loop), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(folder / f"{step:09d}")
        for old in sorted(folder.glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)


def _load(loop: BareLoop, folder: Path) -> int:
    """The step of the newest checkpoint, loaded; 0 without any. Collective: all ranks."""
    newest = max(folder.glob("[0-9]*"), default=None)
    if newest is None:
        return 0
    state = _state(loop)
    dcp.load(state, checkpoint_id=newest)
    set_state_dict(
        loop.model, loop.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )  # the averages were loaded in place
    return int(newest.name)


if __name__ == "__main__":
    main()
