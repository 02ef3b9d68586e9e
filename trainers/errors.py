"""Errors of `trainers`.

TrainersError
├── ConfigError         the user's configuration: nothing was started, fix the named key (exit code 2)
├── StateMismatchError  what was loaded is not what was saved: do not train on it, take an older checkpoint
└── NonFiniteError      loss or gradient is NaN or infinite: the update was not taken
"""

from __future__ import annotations


class TrainersError(Exception):
    """Base of every error that `trainers` raises on purpose."""


class ConfigError(TrainersError):
    """One clear line about one key: what it is, where it stands, what to write instead."""


class StateMismatchError(TrainersError):
    """The restored state differs from its recorded fingerprint, or a part of it is missing."""


class NonFiniteError(TrainersError):
    """The loss or the gradient norm of a step is not finite; the weights were left as they were."""
