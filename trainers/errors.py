"""Errors of `trainers`.

TrainersError
├── ConfigError         the user's configuration: nothing was started, fix the named key (exit code 2)
│   └── BrokenSampleError   one sample of the data is at fault: repair it, or go on without it
├── StateMismatchError  what was loaded is not what was saved: do not train on it, take an older checkpoint
├── CorruptionError     replicas of the state differ: do not save it, go back to what was saved
└── DivergedError       too many bad steps in a row: go back to before the first, leave their data out
"""

from __future__ import annotations


class TrainersError(Exception):
    """Base of every error that `trainers` raises on purpose."""


class ConfigError(TrainersError):
    """One clear line about one key: what it is, where it stands, what to write instead."""


class BrokenSampleError(ConfigError):
    """One sample of the data can not be read, and reading it again will not help."""


class StateMismatchError(TrainersError):
    """The restored state differs from its recorded fingerprint, or a part of it is missing."""


class CorruptionError(TrainersError):
    """A memory or a processor has silently changed bits of the state."""

    def __init__(self, message: str, ranks: tuple[int, ...] = (), alike_step: int = 0) -> None:
        """Args: ranks: whose state differs; alike_step: after this step it did not."""
        super().__init__(message)
        self.ranks = ranks
        self.alike_step = alike_step


class DivergedError(TrainersError):
    """Loss or gradients were not finite, or far too large, in too many steps in a row; none of these was taken."""

    def __init__(self, message: str, skip: tuple[int, int] = (0, 0), num_rollbacks: int = 0) -> None:
        """Args: skip: first and last step to undo and leave out; num_rollbacks: how often that was done before."""
        super().__init__(message)
        self.skip = skip
        self.num_rollbacks = num_rollbacks
