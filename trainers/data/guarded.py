"""A part of a source, without the samples that are left out, which knows what it reads."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from trainers.data.samples import Buckets, Samples, Source, joined
from trainers.errors import BrokenSampleError, ConfigError
from trainers.trace import Blame, StepTrace


class GuardedSource(Source):
    """Reads from another source, and tells the trace what it reads.

    A sample that is left out or broken is replaced by the next one of the dataset that is not, in the order of indices
    (and of the same bucket). So the shape of a batch, the noise at its positions and the length of an epoch stay, and
    who reads it makes no difference.
    """

    def __init__(
        self,
        source: Source,
        trace: StepTrace | None,
        members: np.ndarray | None = None,
        *,
        skip_broken: bool = False,
    ) -> None:
        """Wrap `source`.

        Args:
            trace: None: nobody is told.
            members: (N,) int64, the dataset indices that there are, as 0 .. N - 1; None: the whole dataset.
            skip_broken: replace a broken sample; else it is an error.
        """
        self._source = source
        self._trace = trace
        self._members = members
        self._skip_broken = skip_broken
        self._left_out: frozenset[int] = frozenset()
        self.channels = source.channels
        self.num_classes = source.num_classes
        self.has_captions = source.has_captions
        self.identity, self.buckets, self.latents = source.identity, source.buckets, source.latents
        if source.buckets is not None and members is not None:
            self.buckets = Buckets(shapes=source.buckets.shapes, of=source.buckets.of[members])

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

    def untraced(self, left_out: frozenset[int]) -> GuardedSource:
        """The same source for another thread, which leaves out these samples and tells nobody what it reads."""
        other = copy.copy(self)
        other._trace = None
        other.leave_out(left_out)
        return other

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        """As `Source.read`. On an error the trace tells which samples of the dataset can not be read."""
        if self._left_out:
            indices = np.array([self._replacement(index) for index in indices.tolist()], dtype=np.int64)
        inside = self.inside(indices)
        self._tell(inside)
        try:
            return self._source.read(inside, crops)
        except BrokenSampleError:
            if self._skip_broken:
                return self._without_broken(indices, crops)
            self._find_unreadable(inside)
            raise
        except Exception:
            self._find_unreadable(inside)
            raise

    def inside(self, indices: np.ndarray) -> np.ndarray:
        """The dataset indices of these, (N,) int64."""
        return indices if self._members is None else self._members[indices]

    def _is_left_out(self, index: int) -> bool:
        return (index if self._members is None else int(self._members[index])) in self._left_out

    def _replacement(self, index: int) -> int:
        """`index`, or the one that takes its place."""
        return self._following(index, index) if self._is_left_out(index) else index

    def _following(self, index: int, first: int) -> int:
        """The next one after `index` that is of the bucket of `first` and not left out, round and round."""
        of = None if self.buckets is None else self.buckets.of
        while True:
            index = (index + 1) % len(self)
            if index == first:
                raise ConfigError(
                    "data: every image of this shape is broken or left out; repair the data, or use fewer data.buckets"
                )
            if not self._is_left_out(index) and (of is None or of[index] == of[first]):
                return index

    def _without_broken(self, indices: np.ndarray, crops: np.ndarray | None) -> Samples:
        """One by one, because only so it is known which are broken."""
        parts = []
        for row, index in enumerate(indices.tolist()):
            place, first, broken = None if crops is None else crops[row : row + 1], index, ()
            while True:
                try:
                    found = self._source.read(self.inside(np.array([index], dtype=np.int64)), place)
                    break
                except BrokenSampleError as error:
                    broken = (*broken, str(error))
                    index = self._following(index, first)
            parts.append(replace(found, broken=broken))
        return joined(parts)

    def _tell(self, indices: np.ndarray, blame: Blame = Blame.MICROBATCH) -> None:
        if self._trace is not None:
            self._trace.reading(indices.tolist(), blame)

    def _find_unreadable(self, indices: np.ndarray) -> None:
        if self._trace is None:
            return
        unreadable = [index for index in indices.tolist() if not self._is_readable(index)]
        if 0 < len(unreadable) and (len(unreadable) < len(indices) or len(indices) == 1):
            self._tell(np.array(unreadable), Blame.EXACT)
        else:
            self._tell(indices, Blame.NONE)

    def _is_readable(self, index: int) -> bool:
        try:
            self._source.read(np.array([index], dtype=np.int64))
        except Exception:  # whatever it is: the error of the whole microbatch is the one that is raised
            return False
        return True
