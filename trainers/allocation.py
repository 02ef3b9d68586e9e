"""The C library's memory, kept for the next step instead of given back after each."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 1 << 30


def keep_freed_memory() -> None:
    """From now on the memory of tensors that are freed stays with this process, for the next ones. Local.

    Left alone, glibc maps every large tensor anew, and gives what is free at the end of its heap back; so the kernel
    clears the same pages in every step, which was 8 % of a small UNet's step on a CPU. What the process takes at its
    peak it now keeps; tensors of more than 1 GiB excepted. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, -1)
