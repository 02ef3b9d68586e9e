"""Errors of `orchestrator`: one class for each thing a caller does differently.

    UnbrokenError                   the run failed                                                      exit code 3
    ├── StorageError                the store did not do it: try again                                            5
    │   └── MissingObjectError      there is no such object: trying again does not help                           5
    ├── UnknownOutcomeError         it may or may not have happened: look, delete nothing                         5
    ├── AlreadyExistsError          somebody else created the object first: read theirs                           3
    ├── DamagedCheckpointError      quarantine the checkpoint, take the next older one                            3
    ├── SupersededError             a newer attempt owns the run: stop                                            6
    ├── RunMismatchError            the run was made with another configuration: change a name or a key           2
    ├── RunNotFoundError            the RUN given on the command line is none                                     2
    ├── RegroupError                the workers are to be placed anew: for Ray Train, never for a user            3
    ├── StartError                  no trainer can be started on this node: another may do                        3
    ├── ClusterError                the Ray cluster's job server does not answer, or refuses: try again           3
    └── GaveUpError                 the failure policy ended the run, with its reason                             4

`AlreadyExistsError` is no `StorageError`: the store worked, and repeating is wrong.
`UnknownOutcomeError` is none either: what cleans up after a failed write must not catch it.

Exit codes of `unbroken`: 0 done; 1 an error of no class above, which is our bug; 2 usage or configuration
(`trainers.errors.ConfigError` too); 3 the run failed; 4 gave up; 5 storage; 6 superseded.
"""

from __future__ import annotations

from typing import ClassVar


class UnbrokenError(Exception):
    """Base of every error that `orchestrator` raises on purpose. Takes one message, so that it survives pickling."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str) -> None:
        super().__init__(message)


class StorageError(UnbrokenError):
    """A storage operation failed and left nothing behind that counts."""

    exit_code = 5


class MissingObjectError(StorageError):
    """The object to be read does not exist."""


class UnknownOutcomeError(UnbrokenError):
    """A write was sent, and the store's answer never came; it may even take effect later."""

    exit_code = 5


class AlreadyExistsError(UnbrokenError):
    """Create-if-absent lost: the key holds something else."""


class DamagedCheckpointError(UnbrokenError):
    """A committed checkpoint is not what was written: bytes changed, cut short or missing."""


class SupersededError(UnbrokenError):
    """This attempt is a zombie: a newer one was claimed. It must not write to the run any more."""

    exit_code = 6


class RunMismatchError(UnbrokenError):
    """What is stored under this name was made by another configuration."""

    exit_code = 2


class RunNotFoundError(UnbrokenError):
    """No run at the given URL."""

    exit_code = 2


class RegroupError(UnbrokenError):
    """This group of agents ends on purpose, saved: a node is taken away, or there is room for more workers."""


class ClusterError(UnbrokenError):
    """The job server of a Ray cluster does not answer, or refuses what it is asked."""


class GaveUpError(UnbrokenError):
    """The failure policy decided that going on makes no sense; the message says why."""

    exit_code = 4


HOPELESS_CODES = (RunMismatchError.exit_code, GaveUpError.exit_code, SupersededError.exit_code)
"""Of an `unbroken train` that must not be started again: it would end in the same way."""


class StartError(UnbrokenError):
    """No trainer process can be started here; another node may do."""

    def __init__(self, message: str, details: str = "") -> None:
        """Args: details: the stack trace."""
        super().__init__(message)
        self.details = details
