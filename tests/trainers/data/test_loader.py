from __future__ import annotations

import threading

from trainers.data.loader import ReadAhead


def test_what_is_read_ahead_comes_in_the_order_asked_for() -> None:
    main, threads, now = threading.current_thread(), set(), []

    def read(step: int, microbatch: int) -> tuple[int, int]:
        threads.add(threading.current_thread())
        return step, microbatch

    ahead = ReadAhead(read, num_threads=3, depth=4)
    keys = [(step, microbatch) for step in range(1, 6) for microbatch in (0, 2)]
    taken = [
        ahead.take(key, lambda key=key: now.append(key) or key, iter(keys[place + 1 :]))
        for place, key in enumerate(keys)
    ]
    ahead.close()
    assert taken == keys and main not in threads
    assert now == keys[:1], "only the first one had not been read ahead"


def test_without_threads_everything_is_read_when_it_is_due() -> None:
    ahead = ReadAhead(lambda *key: 1 / 0, num_threads=0, depth=4)
    assert ahead.take((1, 0), lambda: "now", iter([(1, 1)])) == "now"
    ahead.close()


def test_an_error_is_met_again_where_it_is_due() -> None:
    def fail(step: int, microbatch: int) -> str:
        raise OSError("gone")

    ahead = ReadAhead(fail, num_threads=1, depth=2)
    assert ahead.take((1, 0), lambda: "first", iter([(1, 1)])) == "first"
    assert ahead.take((1, 1), lambda: "second try", iter([])) == "second try"
    ahead.close()


def test_what_is_not_wanted_any_more_is_dropped() -> None:
    read: list[tuple[int, int]] = []
    ahead = ReadAhead(lambda *key: read.append(key) or key, num_threads=1, depth=2)
    ahead.take((1, 0), lambda: (1, 0), iter([(1, 1), (1, 2)]))
    assert ahead.take((9, 0), lambda: (9, 0), iter([(9, 1)])) == (9, 0)
    assert ahead.take((9, 1), lambda: (0, 0), iter([])) == (9, 1)
    ahead.close()
