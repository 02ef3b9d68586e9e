"""What the device can do at most: measured in the same run, as no datasheet says what this one does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bench.figure import Figure
from bench.on_gpu.device import in_turn, name_of, queued_s

_NAMED_TFLOPS = {
    "H200": 989.5,
    "GH200": 989.5,
    "H100 80GB HBM3": 989.5,
    "H100 PCIe": 756.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}
"""Dense bf16 with sums in float32, as the vendor names it."""
_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """In units a second."""

    device: str
    matmul_flops: float
    """Of a large bf16 product of random numbers."""
    copy_bytes: float
    """Bytes read and bytes written, within the device's memory."""
    to_host_bytes: float
    """Into pinned memory."""
    to_device_bytes: float

    @property
    def named_flops(self) -> float | None:
        """Of the datasheet; None: this device is not known here. The longest name that fits is the device's."""
        fitting = [name for name in _NAMED_TFLOPS if name in self.device]
        return 1e12 * _NAMED_TFLOPS[max(fitting, key=len)] if fitting else None

    def figures(self) -> list[Figure]:
        named = self.named_flops
        return [
            Figure(
                name="limits: bf16 matrix product",
                value=self.matmul_flops / 1e12,
                unit="TFLOP/s",
                notes={"device": self.device, "named TFLOP/s": "not known here" if named is None else named / 1e12},
            ),
            Figure(name="limits: copy within the device, read and written", value=self.copy_bytes / 1e9, unit="GB/s"),
            Figure(name="limits: device to pinned memory", value=self.to_host_bytes / 1e9, unit="GB/s"),
            Figure(name="limits: pinned memory to device", value=self.to_device_bytes / 1e9, unit="GB/s"),
        ]


def measure_limits(device: torch.device, quick: bool) -> Limits:
    """Takes about 2 GiB of the device. Local; several ranks measure at the same time, as they train."""
    size, num_bytes = (64, 1 << 16) if quick else (8192, 1 << 30)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    product = torch.empty_like(left)
    arms = {
        "matmul": lambda: torch.mm(left, right, out=product),
        "copy": lambda: target.copy_(source),
        "to host": lambda: host.copy_(source, non_blocking=True),
        "to device": lambda: target.copy_(host, non_blocking=True),
    }
    times = {name: float(np.median(s)) for name, s in in_turn(device, arms, 2 if quick else _ROUNDS, queued_s).items()}
    return Limits(
        device=name_of(device),
        matmul_flops=2 * size**3 / times["matmul"],
        copy_bytes=2 * num_bytes / times["copy"],
        to_host_bytes=num_bytes / times["to host"],
        to_device_bytes=num_bytes / times["to device"],
    )
