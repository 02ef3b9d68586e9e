from __future__ import annotations

import pytest

from orchestrator.coordination.next_launch import NextLaunch


def test_storage_that_came_back_has_all_patience_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("orchestrator.coordination.next_launch.time.monotonic", lambda: now[0])
    launch = NextLaunch(patience_s=100.0)
    for _ in range(2):
        begun_s = now[0]
        while now[0] < begun_s + 80.0:
            delay_s = launch.failed()
            assert delay_s is not None and launch.planned and not launch.take()
            now[0] += delay_s
            assert launch.take() and not launch.planned
        launch.succeeded()
    assert launch.failed() is not None
    now[0] += 100.0
    assert launch.failed() is None, "it was the last one"
