from __future__ import annotations

import mmap
import os

from trainers.trace import Blame, Place, Stage, StepTrace, num_bytes, read_place


def test_another_process_reads_what_a_rank_is_at() -> None:
    handle = os.memfd_create("test")
    os.ftruncate(handle, num_bytes(4))
    trace = StepTrace(4, memoryview(mmap.mmap(handle, 0)))
    memory = memoryview(mmap.mmap(handle, 0))
    assert read_place(memory) is None
    trace.enter(9, 2, 200)
    assert read_place(memory) == Place(
        step=9, microbatch=2, position=200, stage=Stage.DATA, blame=Blame.MICROBATCH, samples=()
    )
    trace.reading([7, 3, 5, 1])
    trace.computing()
    place = read_place(memory)
    assert place is not None and place.stage is Stage.MODEL and place.samples == (7, 3, 5, 1)
    trace.reading([3], Blame.EXACT)
    place = read_place(memory)
    assert place is not None and place == trace.place() and (place.samples, place.blame) == ((3,), Blame.EXACT)
    trace.leave([0.5, 0.25])
    assert read_place(memory) is None and trace.losses == (0.5, 0.25)
    os.close(handle)
