"""Run a function on several ranks, in one call."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "diffusers", "trainers.build", "sklearn.datasets"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240) -> list[Any]:
    """Call `function(*arguments)` on `world_size` gloo ranks, one thread each; what they return, by rank.

    Raises:
        AssertionError: a rank failed; its own error is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank_main, args=(theirs, rank, world_size, str(Path(folder) / "store"), function, arguments)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            results = [_receive(rank, pipe, timeout_s) for rank, pipe in enumerate(pipes)]
            for process in processes:
                process.join(10)  # killed at once, a rank could still be seen to vanish by one in the barrier
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _receive(rank: int, pipe: Connection, timeout_s: float) -> Any:
    assert wait([pipe], timeout_s), f"rank {rank} said nothing for {timeout_s} s"
    kind, value = pickle.loads(pipe.recv_bytes())
    assert kind == "result", f"rank {rank} failed: {value}"
    return value


def _rank_main(
    pipe: Connection, rank: int, world_size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        pipe.send_bytes(pickle.dumps(("result", function(*arguments))))  # by value: torch would share tensors
        dist.barrier()
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(("error", repr(error))))
        raise
