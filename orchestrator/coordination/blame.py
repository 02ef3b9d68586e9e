"""Which rank is it that the others wait for? A judgement on stacks: pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from orchestrator.messages.liveness import Stack

# Frames in which a rank waits for its peers: torch's collectives, and what of ours calls them.
_WAITING = re.compile(r'File "[^"]*(/torch/distributed/|/trainers/(exchanges|reduction|norm|parallel)\.py)')
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>.+)')
_INNERMOST = 6
"""Frames looked at: user code may well be *called* by torch.distributed (hooks), further out."""


def stuck_ranks(stacks: Mapping[int, Stack | None]) -> dict[int, str]:
    """The ranks that the others wait for, each with a sentence; empty if all of them wait for each other.

    A rank that is stopped is cause enough: it is noticed so soon that others may just be at work.

    Args:
        stacks: of every rank; None for one whose agent did not answer.
    """
    found, one_is_stopped = {}, any(stack is not None and stack.state == "T" for stack in stacks.values())
    for rank, stack in sorted(stacks.items()):
        if stack is None:
            found[rank] = "its agent does not answer"
        elif stack.state == "T":
            found[rank] = "stopped by a signal (SIGSTOP); a stopped process has no stack to give"
        elif stack.state in ("Z", ""):
            continue  # it has ended, and that is about to be reported
        elif not stack.text:
            found[rank] = f"in state {stack.state}, and it answers no signal"
        elif not one_is_stopped and not _waits(stack.text):
            found[rank] = f"at {where(stack.text)}"
    return found


def where(text: str) -> str:
    """The innermost frame of the main thread, as file:line in function."""
    frame = _FRAME.search(_main_thread(text))
    return f"{frame['file']}:{frame['line']} in {frame['name']}" if frame else "no Python frame"


def _waits(text: str) -> bool:
    frames = [line for line in _main_thread(text).splitlines() if line.lstrip().startswith("File ")]
    return any(_WAITING.search(line) for line in frames[:_INNERMOST])


def _main_thread(text: str) -> str:
    """faulthandler writes the main thread last, innermost frame first."""
    return text.rpartition("hread 0x")[2]
