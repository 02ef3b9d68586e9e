"""Pausing the garbage collector."""

from __future__ import annotations

import gc
import threading

import pytest

from orchestrator.checkpoint.collector import collector_paused


def test_it_is_off_within_and_on_after_whatever_happens() -> None:
    with pytest.raises(ZeroDivisionError), collector_paused():
        with collector_paused():
            pass
        assert not gc.isenabled(), "the inner one has not switched it on"
        _ = 1 / 0
    assert gc.isenabled()


def test_it_stays_off_for_who_wants_that() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_that_overlap_leave_it_on() -> None:
    entered, left = threading.Event(), threading.Event()

    def overlap() -> None:
        with collector_paused():
            entered.set()
            left.wait()

    thread = threading.Thread(target=overlap)
    with collector_paused():
        thread.start()
        entered.wait()
    left.set()
    thread.join()
    assert gc.isenabled()
