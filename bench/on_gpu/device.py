"""The device that is measured on, its clocks, and which kernels run on it."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist

from bench.room import available_bytes

_HEAD_START_CYCLES = 20_000_000
"""About 10 ms of a GPU, in which the host queues what is measured: as in training, where the GPU is behind it."""


def here() -> torch.device:
    """This rank's GPU; where there is none, the CPU, for trying the benchmark out."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def free_bytes(device: torch.device) -> int:
    """What tensors may still take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def tidy(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """A process group: torchrun's, or one of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        yield
        return
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Inside, kernels that repeat themselves bitwise, as in our trainings; or the fastest, as torch's guide has it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waited_s(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds until `function` has returned and the device has done what it asked for. Collective: all ranks."""
    dist.barrier()
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def queued_s(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds of the device alone, by its own clock; `function` must not wait for the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def in_turn(
    device: torch.device,
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[torch.device, Callable[[], object]], float],
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round; the order alternates, and the first `warm_up` rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warm_up + rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            times[name].append(clock(device, arms[name]))
    return {name: values[warm_up:] for name, values in times.items()}
