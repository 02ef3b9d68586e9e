from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.messages.attempts import Event
from orchestrator.tracking.live_page import Terminal, page, show
from orchestrator.tracking.overview import RunView
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.tracking.story import CONFIG, T0, new_store, one_kill, record


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def run(tmp_path: Path) -> str:
    store = Store.open(str(tmp_path / "run"))
    open_or_create(store, CONFIG)
    record(store, one_kill())
    save(store, make_state(30), step=30, world_size=2)
    return store.url


def test_a_finished_run(run: str):
    text = unbroken("status", run).stdout
    for part in ("finished since", "step 30 of 100 (30%)", "attempt 2", "restarts 1, lost steps 10", "goodput 57.7%"):
        assert part in " ".join(text.split()), part
    assert "killed, 10 steps lost, training again after 5.5 s" in " ".join(text.split())
    assert "0000000000300-0001" in text and "stable" in text and "█" in text


def test_json(run: str):
    seen = json.loads(unbroken("status", run, "--json").stdout)
    assert (seen["state"], seen["step"], seen["attempts"], seen["lost_steps"]) == ("finished", 30, 2, 10)
    assert seen["seconds"]["lost"] == 10 and sum(seen["seconds"].values()) == pytest.approx(seen["wall_s"])
    assert seen["newest_stable"] == "0000000000300-0001" and seen["metrics"]["step"] == 30
    assert seen["recoveries"] == [
        {"time": T0 + 25.5, "cause": "killed", "from_step": 20, "to_step": 10, "lost_steps": 10, "seconds": 5.5}
    ]


def test_the_arithmetic_of_an_interval_that_was_found_out(run: str):
    fields = {"every_steps": 37, "arithmetic": "C + sqrt(2 (M + R) C + C^2) = 9 s"}
    record(Store.open(run), [Event(kind="cadence", fields=fields, time_s=T0 + 100)], writer="1" * 8)
    text = " ".join(unbroken("status", run).stdout.split())
    assert "every_steps: auto: C + sqrt(2 (M + R) C + C^2) = 9 s" in text
    assert "a checkpoint every 37 steps from now on" in text
    assert json.loads(unbroken("status", run, "--json").stdout)["cadence"] == fields["arithmetic"]


def test_watch_ends_with_the_run(run: str):
    lines = unbroken("status", run, "--watch", "--json").stdout.splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["state"] == "finished"
    assert "finished" in unbroken("status", run, "--watch").stdout


def test_a_terminal_that_cannot_draw_gets_lines(run: str):
    seen = RunView(run, None, 1).look()
    terminal = Terminal(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    show([seen, seen], terminal)
    assert terminal.file.getvalue().splitlines() == [
        "finished  step 30 of 100 (30%)  8 samples/s  2 workers  attempt 2  restarts 1, lost steps 10"
    ]


def test_in_a_narrow_terminal_no_fact_is_broken(run: str):
    terminal = Terminal(file=io.StringIO(), width=40)
    terminal.print(page(RunView(run, None, 1).look(), 40))
    lines = terminal.file.getvalue().splitlines()
    at = lines.index("step 30 of 100 (30%)  8 samples/s")
    assert lines[at + 1 : at + 3] == ["2 workers  attempt 2", "restarts 1, lost steps 10"]
    assert max(map(len, lines)) <= 40


def test_a_run_that_trains_now_and_one_that_was_left_behind():
    store = new_store()
    since = time.time() - 31 - T0
    record(store, [Event(kind=one.kind, fields=one.fields, time_s=one.time_s + since) for one in one_kill()[:35]])
    seen = json.loads(unbroken("status", store.url, "--json").stdout)
    assert seen["state"] == "training" and 0 < seen["eta_s"] < 200
    assert sum(seen["seconds"].values()) == pytest.approx(seen["wall_s"])
    assert "ETA" in unbroken("status", store.url).stdout
    left = new_store()
    record(left, one_kill()[:20])
    assert "no sign of life since" in unbroken("status", left.url).stdout


def test_a_run_without_a_record_yet():
    store = new_store({})
    text = unbroken("status", store.url).stdout
    assert "not started" in text and "no checkpoint yet" in text
    assert json.loads(unbroken("status", store.url, "--json").stdout)["goodput"] is None


def test_report(run: str, tmp_path: Path):
    out = tmp_path / "new" / "report.html"
    result = unbroken("report", run, str(out))
    assert result.exit_code == 0 and str(out) in result.stdout
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["status"], "Missing argument 'RUN'"),
        (["status", "nowhere"], "no run at"),
        (["report", "RUN"], "Missing argument 'OUT.html'"),
        (["report", "RUN", "out.png"], "does not end in .html"),
        (["report", "RUN", "/proc/none/out.html"], "cannot write /proc/none/out.html"),
        (["report", "nowhere", "out.html"], "no run at"),
    ],
)
def test_mistakes_are_one_line(run: str, args: list[str], message: str):
    result = unbroken(*(run if part == "RUN" else part for part in args))
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
