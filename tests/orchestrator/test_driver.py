"""How often the driver calls Ray Train; Ray itself is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator import driver
from orchestrator.config import load_config
from orchestrator.errors import GaveUpError, UnbrokenError
from orchestrator.interrupts import Interrupts
from orchestrator.messages.attempts import Event
from tests.orchestrator.group import make_spec
from tests.orchestrator.test_train import write_config

pytestmark = pytest.mark.ray  # imports it


def nothing(*_: object, **__: object) -> Any:
    """Ray's actors, nodes and events."""
    return SimpleNamespace(tend=nothing, close=nothing, finish=lambda: None, order=SimpleNamespace(remote=nothing))


class Controllers:
    """In the place of Ray Train: each dies, after which the newest checkpoint is of one of `steps`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: list[int | None]) -> None:
        self.steps, self.num_calls = iter(steps), 0
        for name in ("Keepers", "live_nodes", "make_mailbox", "Listener", "NodeWatch", "_trainer"):
            monkeypatch.setattr(driver, name, nothing)
        monkeypatch.setattr(driver, "_fit", self.fit)
        monkeypatch.setattr(driver, "_newest_step", lambda spec: next(self.steps))
        monkeypatch.setattr(driver.time, "sleep", nothing)

    def fit(self, *_: object) -> Exception:
        self.num_calls += 1
        return RuntimeError("the controller died")


@pytest.mark.parametrize(
    ("steps", "num_calls"),
    [([None] * 9, 5), ([5] * 9, 5), ([5, 5, 5, 5, 10, 10, 15, 15, 15, 15, 15], 11)],
)
def test_a_controller_that_dies_again_and_again_ends_the_run_unless_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int | None], num_calls: int
) -> None:
    controllers, noted = Controllers(monkeypatch, steps), list[Event]()
    config = load_config(write_config(tmp_path), ())
    with pytest.raises(UnbrokenError, match="the controller died; 5 times in a row without a newer checkpoint"):
        driver._supervise(config, make_spec(str(tmp_path)), noted.append, noted.append, Interrupts(1.0))
    assert controllers.num_calls == num_calls
    assert [event.kind for event in noted] == ["controller_lost"] * (num_calls - 1)


def test_agents_that_never_begin_an_attempt_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controllers = Controllers(monkeypatch, [None] * 9)
    lost = WorkerGroupError("", {0: OSError("this node is broken")})
    monkeypatch.setattr(driver, "_fit", lambda *_: lost)
    config = load_config(write_config(tmp_path), ())
    with pytest.raises(GaveUpError, match=r"30 groups of agents in a row .*rank 0: OSError: this node is broken"):
        driver._supervise(config, make_spec(str(tmp_path)), nothing, nothing, Interrupts(1.0))
    assert next(controllers.steps) is None, "it was not taken for the death of a controller"
