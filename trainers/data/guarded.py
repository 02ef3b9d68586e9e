"""A part of a source, without the samples that are left out, which knows what it reads."""

from __future__ import annotations

import numpy as np

from trainers.data.sources import Samples, Source
from trainers.errors import ConfigError
from trainers.trace import Blame, StepTrace


class GuardedSource:
    """Reads from another source, and tells the trace what it reads.

    A sample that is left out is replaced by the next one of the dataset that is not, in the order of indices. So the
    shape of a batch, the noise at its positions and the length of an epoch stay, and who reads it makes no difference.
    """

    def __init__(self, source: Source, trace: StepTrace, members: np.ndarray | None = None) -> None:
        """Args: members: (N,) int64, the dataset indices that there are, as 0 .. N - 1; None: the whole dataset."""
        self._source = source
        self._trace = trace
        self._members = members
        self._left_out: frozenset[int] = frozenset()
        self.channels = source.channels
        self.num_classes = source.num_classes
        self.has_captions = source.has_captions

    def __len__(self) -> int:
        return len(self._source) if self._members is None else len(self._members)

    def leave_out(self, samples: frozenset[int]) -> None:
        """Replace these dataset indices from now on, and no others.

        Raises:
            ConfigError: nothing would be left.
        """
        if samples == self._left_out:
            return
        mine = len(samples) if self._members is None else np.isin(list(samples), self._members).sum()
        if mine >= len(self):
            raise ConfigError(f"data.quarantine has left out all {len(self)} samples of the dataset; repair it")
        self._left_out = samples

    def read(self, indices: np.ndarray) -> Samples:
        """As `Source.read`. On an error the trace tells which samples of the dataset can not be read."""
        if self._left_out:
            indices = np.array([self._replacement(index) for index in indices.tolist()], dtype=np.int64)
        indices = indices if self._members is None else self._members[indices]
        self._trace.reading(indices.tolist())
        try:
            return self._source.read(indices)
        except Exception:
            self._find_unreadable(indices)
            raise

    def _replacement(self, index: int) -> int:
        while (index if self._members is None else int(self._members[index])) in self._left_out:
            index = (index + 1) % len(self)
        return index

    def _find_unreadable(self, indices: np.ndarray) -> None:
        unreadable = [index for index in indices.tolist() if not self._is_readable(index)]
        if 0 < len(unreadable) and (len(unreadable) < len(indices) or len(indices) == 1):
            self._trace.reading(unreadable, Blame.EXACT)
        else:
            self._trace.reading(indices.tolist(), Blame.NONE)

    def _is_readable(self, index: int) -> bool:
        try:
            self._source.read(np.array([index], dtype=np.int64))
        except Exception:  # whatever it is: the error of the whole microbatch is the one that is raised
            return False
        return True
