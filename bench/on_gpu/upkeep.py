"""What a training does beside its steps: the EMA, the copy of the state to the host, the hashes of it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from bench.comparison import Comparison
from bench.figure import Figure
from bench.on_gpu.device import in_turn, queued_s, synchronize, waited_s
from bench.on_gpu.limits import Limits
from bench.on_gpu.snapshots import Snapshots
from bench.on_gpu.steps import Ours
from bench.room import missing_room
from orchestrator.agents.snapshot_layout import layout, owned_rows, owned_tensors, targets
from trainers.integrity import digests
from trainers.state import fingerprints

Result = Comparison | Figure

_EMA_GOAL = round(1 / 0.9, 3)
"""At least 0.9 of the bandwidth of a copy."""
_EMA_LONGEST_S, _EMA_SHARE, _STALL_GOAL, _STALL_SHARE, _DIGEST_SHARE = 0.0025, 0.3, 1.15, 0.3, 0.1
_PIECE_BYTES = 256 << 20
_EVERY = 50
"""Steps from one save, or comparison of replicas, to the next that is spoken of."""


def ema(ours: Ours, limits: Limits, step_s: float | None, rounds: int) -> Iterator[Result]:
    """An update beside a copy that moves as many bytes: 12 for each parameter."""
    state, device = ours.state, ours.device
    state.ema.update(1)  # begins, if no step did
    numel = sum(parameter.local.numel() for parameter in state.parameters)
    source = torch.zeros(numel * 3 // 2, device=device)  # read once and written once: 8 bytes an element
    target = torch.empty_like(source)
    arms = {"ours": lambda: state.ema.update(2), "copy": lambda: target.copy_(source)}
    times = in_turn(device, arms, rounds, queued_s)
    middle = float(np.median(times["ours"]))
    aimed = "H200" in limits.device and ours.part.startswith("sd2-unet")
    yield Comparison(
        name=f"{ours.part}: EMA update",
        reference_name="copy of as many bytes",
        ours_s=times["ours"],
        reference_s=times["copy"],
        goal=_EMA_GOAL,
        max_s=_EMA_LONGEST_S if aimed else None,
        notes={"GB/s": {name: 12e-9 * numel / float(np.median(seconds)) for name, seconds in times.items()}},
    )
    if step_s is not None:
        yield _share(ours, "EMA update, share of a step", middle / step_s, _EMA_SHARE)


def staging(ours: Ours, snapshots: Snapshots, step_s: float | None, rounds: int) -> Iterator[Result]:
    """The stall of a save, until the step after it may begin, beside the least that its bytes take over the link."""
    device, size = ours.device, snapshots.size_bytes
    first = waited_s(device, snapshots.save)
    link, pinned = _Link(device, size), _Pinned(ours)
    try:
        arms = {"ours": snapshots.save, "pinned": pinned.copy, "link": link.copy}
        times = in_turn(device, arms, rounds, waited_s)
    finally:
        pinned.close()
    yield Comparison(
        name=f"{ours.part}: stall of a save, {size / 1e6:.0f} MB",
        reference_name="as many bytes into pinned memory",
        ours_s=times["ours"],
        reference_s=times["link"],
        goal=_STALL_GOAL,
        notes={
            "GB/s": {name: 1e-9 * size / float(np.median(seconds)) for name, seconds in times.items()},
            "stall of the first save (ms)": 1000 * first,
        },
    )
    yield Comparison(
        name=f"{ours.part}: stall of a save",
        reference_name="the same copy, were the agent's memory pinned",
        ours_s=times["ours"],
        reference_s=times["pinned"],
    )
    if step_s is not None:
        share = float(np.median(times["ours"])) / (_EVERY * step_s)
        yield _share(ours, f"stall of a save, share of {_EVERY} steps", share, _STALL_SHARE)


def room_for_snapshots(ours: Ours) -> str | None:
    """What there is too little of for `staging`, of the host's memory; None: nothing."""
    return missing_room(memory_bytes=2 * _snapshot_bytes(ours))


def hashes(ours: Ours, step_s: float | None, rounds: int) -> Iterator[Result]:
    """The fingerprint of a state, which is computed on the host, and the digest on the device that replicas compare."""
    device, size = ours.device, _snapshot_bytes(ours)
    arms = {"fingerprint": lambda: fingerprints(ours.state)}
    whole = float(np.median(in_turn(device, arms, 2, waited_s, warm_up=1)["fingerprint"]))  # seconds each
    yield Figure(
        name=f"{ours.part}: fingerprint of the state, at a restore and on the host",
        value=whole,
        unit="s",
        notes={"GB/s": 1e-9 * size / whole},
    )
    digest_s = float(np.median(in_turn(device, {"digest": lambda: digests(ours.state)}, rounds, queued_s)["digest"]))
    yield Figure(
        name=f"{ours.part}: digest of the state on the device",
        value=1000 * digest_s,
        unit="ms",
        notes={"GB/s": 1e-9 * size / digest_s},
    )
    if step_s is not None:
        yield _share(ours, f"digest, share of {_EVERY} steps", digest_s / (_EVERY * step_s), _DIGEST_SHARE)


def _snapshot_bytes(ours: Ours) -> int:
    return layout(owned_tensors(ours.state))[-1].end


class _Link:
    """As many bytes in large pieces, over and over from and into the same ones."""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        piece = min(size_bytes, _PIECE_BYTES)
        self._device, self._times = device, -(-size_bytes // piece)
        self._rest = size_bytes - (self._times - 1) * piece
        self._source = torch.zeros(piece, dtype=torch.uint8, device=device)
        self._target = torch.empty(piece, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def copy(self) -> None:
        for _ in range(self._times - 1):
            self._target.copy_(self._source, non_blocking=True)
        self._target[: self._rest].copy_(self._source[: self._rest], non_blocking=True)
        synchronize(self._device)


class _Pinned:
    """What a save would copy into, were the agent's memory pinned: the same rows at the same places."""

    def __init__(self, ours: Ours) -> None:
        owned = owned_tensors(ours.state)
        chunks = layout(owned)
        self._device, self._rows = ours.device, owned_rows(owned)
        self._memory = mmap.mmap(-1, chunks[-1].end, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._targets = targets(chunks, self._rows, self._memory)
        self._pinned = torch.frombuffer(self._memory, dtype=torch.uint8)
        if self._device.type == "cuda":
            _checked(cast(Any, torch.cuda.cudart()).cudaHostRegister(self._pinned.data_ptr(), len(self._pinned), 0))

    def copy(self) -> None:
        torch._foreach_copy_(self._targets, self._rows, non_blocking=True)
        synchronize(self._device)

    def close(self) -> None:
        if self._device.type == "cuda":
            _checked(cast(Any, torch.cuda.cudart()).cudaHostUnregister(self._pinned.data_ptr()))


def _checked(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"CUDA answers {int(code)} to a request to pin memory of the host, or to let go of it")


def _share(ours: Ours, what: str, share: float, goal: float) -> Figure:
    return Figure(name=f"{ours.part}: {what}", value=100 * share, unit="%", goal=goal)
