"""Kernels that give the same bits whenever they run: torch's defaults on a GPU do not all do so."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic


def use_deterministic_kernels(device: torch.device) -> None:
    """From now on run only kernels on `device` that repeat themselves bitwise. Local; before the first of them.

    On a GPU the backward passes of attention and of several convolutions add in the order in which threads happen to
    finish, and cuBLAS may share its workspace among streams; torch has other forms of nearly all of them, and raises
    where it has none. On a CPU the order follows from the number of threads.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS, which torch would refuse without
    torch.use_deterministic_algorithms(True)  # with `warn_only` attention would stay as it is
    # It finds bugs, for a pass over all new memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False  # takes the kernels that were fastest when tried
