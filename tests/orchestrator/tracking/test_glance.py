from __future__ import annotations

import uuid
from pathlib import Path

from orchestrator.checkpoint.keys import EVENTS, RUN_RECORD
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.tracking import glance as module
from orchestrator.tracking.glance import glance, glance_at_runs
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.tracking.story import CONFIG, T0, event, new_store, one_kill, record, started, training


def test_runs_in_all_states_and_what_is_no_run():
    url = f"memory://{uuid.uuid4().hex}"
    finished, left, fresh, broken = (Store.open(f"{url}/{name}") for name in ("a", "b", "c", "d"))
    for store in (finished, left, fresh):
        open_or_create(store, CONFIG)
    record(finished, one_kill())
    save(finished, make_state(30), step=30, world_size=2)
    record(left, one_kill()[:20])
    broken.write(RUN_RECORD, [b"{"])
    Store.open(f"{url}/e").write("x", [b"no run"])
    seen = list(glance_at_runs(url))
    assert [one.url.rpartition("/")[2] for one in seen] == ["a", "b", "c", "d"]
    assert [one.state for one in seen] == ["finished", "no sign of life", "not started", "damaged"]
    assert (seen[0].step, seen[0].num_steps, seen[0].newest_stable, seen[0].newest_stable_step) == (
        30,
        100,
        "0000000000300-0001",
        30,
    )
    assert seen[0].since_s == T0 + 52 and seen[2].since_s is None and seen[2].newest_stable is None
    assert "run.json is damaged" in seen[3].why


def test_only_the_newest_events_are_read(monkeypatch):
    monkeypatch.setattr(module, "_MOST_EVENTS", 64)
    store = new_store()
    record(store, [started(0), training(5, 1, 0)], number=1)
    for number in range(2, 40):
        record(store, [event(5 + number, "alive", session="a", attempt=1, step=number)] * 4, f"{number:08x}", number)
    record(store, [training(60, 1, 40)], "f" * 8, 40)
    read = []
    monkeypatch.setattr(Store, "read", lambda self, key, *a, real=Store.read: read.append(key) or real(self, key, *a))
    seen = glance(store.url, T0 + 61)
    assert seen is not None and (seen.state, seen.step) == ("training", 40)
    assert len([key for key in read if key.startswith(EVENTS)]) < 30


def test_it_reads_on_until_the_state_is_known(monkeypatch):
    monkeypatch.setattr(module, "_ENOUGH_EVENTS", 2)
    store = new_store()
    record(store, [started(0), training(5, 1, 0)], number=1)
    for number in range(2, 30):
        record(store, [event(5 + number, "alive", session="a", attempt=1, step=number)], f"{number:08x}", number)
    seen = glance(store.url, T0 + 40)
    assert seen is not None and (seen.state, seen.step) == ("training", 29)


def test_a_run_that_was_made_longer():
    store = new_store()
    record(store, [event(0, "started", session="a", num_steps=120, host="h", pid=1, workers=2)], number=1)
    for number in range(2, 40):
        record(store, [event(5 + number, "alive", session="a", attempt=1, step=number)] * 4, f"{number:08x}", number)
    record(store, [training(60, 1, 40)], "f" * 8, 40)
    seen = glance(store.url, T0 + 61)
    assert seen is not None and (seen.step, seen.num_steps) == (40, 120)


def test_files_beside_the_runs_of_a_folder(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    open_or_create(Store.open(str(tmp_path / "run")), CONFIG)
    assert [one.url for one in glance_at_runs(str(tmp_path))] == [str(tmp_path / "run")]
