from __future__ import annotations

import numpy as np
import pytest
import torch

from trainers.data.guarded import GuardedSource
from trainers.data.samples import Buckets, Samples, Source
from trainers.errors import BrokenSampleError, ConfigError
from trainers.trace import Blame, StepTrace


class Numbers(Source):
    """Ten images of their own index, some of which can not be read."""

    channels, num_classes, has_captions = 1, None, False

    def __init__(self, *unreadable: int) -> None:
        self.unreadable = set(unreadable)

    def __len__(self) -> int:
        return 10

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        if broken := self.unreadable & set(indices.tolist()):
            raise ValueError(f"{broken} can not be read")
        images = torch.from_numpy(indices).float().view(-1, 1, 1, 1)
        return Samples(images=images, sizes=torch.zeros(len(indices), 6))


def read(left_out: set[int], indices: list[int], members: list[int] | None = None) -> list[int]:
    source = GuardedSource(Numbers(), StepTrace(4), None if members is None else np.array(members))
    source.leave_out(frozenset(left_out))
    return source.read(np.array(indices)).images.flatten().int().tolist()


def test_a_sample_that_is_left_out_is_replaced_by_the_next_that_is_not() -> None:
    assert read(set(), [3, 9, 0]) == [3, 9, 0]
    assert read({3}, [3, 4, 2]) == [4, 4, 2]
    assert read({3, 4, 9}, [3, 9, 4]) == [5, 0, 5]
    with pytest.raises(ConfigError, match="all 10 samples"):
        read(set(range(10)), [1])


def test_a_part_of_the_dataset_has_numbers_of_its_own_and_takes_no_other_samples() -> None:
    assert read(set(), [0, 2, 1], [1, 4, 8]) == [1, 8, 4]
    assert read({4, 2}, [1], [1, 4, 8]) == [8]
    assert read({8, 2}, [2], [1, 4, 8]) == [1], "not 9, which is not a part"
    assert read({0, 2, 3, 4}, [0], [1, 4, 8]) == [1], "more are left out than there are here, but others"
    with pytest.raises(ConfigError, match="all 3 samples"):
        read({1, 4, 8, 9}, [0], [1, 4, 8])


def test_the_trace_names_samples_of_the_dataset() -> None:
    trace = StepTrace(4)
    source = GuardedSource(Numbers(8), trace, np.array([1, 4, 8]))
    trace.enter(1, 0, 0)
    with pytest.raises(ValueError, match="8"):
        source.read(np.array([0, 2]))
    place = trace.place()
    assert place is not None and place.samples == (8,) and place.blame is Blame.EXACT


@pytest.mark.parametrize(
    ("unreadable", "indices", "samples", "blame"),
    [
        ({4}, [3, 4, 5, 6], (4,), Blame.EXACT),
        ({4, 6}, [3, 4, 5, 6], (4, 6), Blame.EXACT),
        ({4}, [4], (4,), Blame.EXACT),
        ({3, 4}, [3, 4], (3, 4), Blame.NONE),
    ],
)
def test_an_error_says_which_samples_can_not_be_read(
    unreadable: set[int], indices: list[int], samples: tuple[int, ...], blame: Blame
) -> None:
    trace = StepTrace(4)
    trace.enter(1, 0, 0)
    with pytest.raises(ValueError, match="can not be read"):
        GuardedSource(Numbers(*unreadable), trace).read(np.array(indices))
    place = trace.place()
    assert place is not None and (place.samples, place.blame) == (samples, blame)


class Broken(Numbers):
    """Some of its images are broken for good."""

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        try:
            return super().read(indices)
        except ValueError as error:
            raise BrokenSampleError(f"sample {min(self.unreadable & set(indices.tolist()))}") from error


def test_a_broken_sample_is_replaced_by_the_next_that_is_not() -> None:
    source = GuardedSource(Broken(3, 4, 9), StepTrace(4), skip_broken=True)
    source.leave_out(frozenset({5}))
    together = source.read(np.array([3, 2, 9, 5]))
    assert together.images.flatten().tolist() == [6, 2, 0, 6]
    assert together.broken == ("sample 3", "sample 4", "sample 9")
    alone = [source.read(np.array([index])).images.item() for index in (3, 2, 9, 5)]
    assert alone == [6, 2, 0, 6], "what takes a place is a function of the sample alone"
    assert source.untraced(frozenset()).read(np.array([3])).images.item() == 5
    with pytest.raises(ConfigError, match="every image of this shape is broken or left out"):
        GuardedSource(Broken(*range(10)), StepTrace(4), skip_broken=True).read(np.array([2]))
    with pytest.raises(BrokenSampleError, match="sample 3"):
        GuardedSource(Broken(3), StepTrace(4)).read(np.array([3]))


def test_a_replacement_is_of_the_same_bucket() -> None:
    numbers = Numbers()
    numbers.buckets = Buckets(shapes=((1, 1), (1, 2)), of=np.arange(10) % 2)
    source = GuardedSource(numbers, StepTrace(4))
    source.leave_out(frozenset({3, 5}))
    assert source.read(np.array([3, 4])).images.flatten().tolist() == [7, 4]
    source.leave_out(frozenset({1, 3, 5, 7, 9}))
    with pytest.raises(ConfigError, match="of this shape"):
        source.read(np.array([3]))
