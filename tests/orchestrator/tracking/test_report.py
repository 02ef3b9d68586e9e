"""The page: whole, offline, escaped, small, and looked at by a browser where there is one."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.checkpoint import keys
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Event
from orchestrator.tracking.losses import Losses
from orchestrator.tracking.overview import Overview, RunView, State, as_json
from orchestrator.tracking.report import MOST_CHECKPOINTS, page
from orchestrator.tracking.telling import told
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.tracking.story import (
    CONFIG,
    T0,
    attempt,
    down,
    event,
    finished,
    new_store,
    one_kill,
    record,
    snapshot,
    started,
    steps,
    training,
)

VOID = {"meta", "img", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Parser(html.parser.HTMLParser):
    """Every tag is closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def look(store: Store, now: float = 60) -> Overview:
    view = RunView(store.url, None, MOST_CHECKPOINTS)
    view.store = store
    return view.look(T0 + now)


def check(text: str) -> Parser:
    parsed = Parser(text)
    assert "<script" not in text and not re.search(r"(src|href)=\"(?!data:)", text) and "url(" not in text
    assert "http:" not in text and "https:" not in text
    return parsed


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """One kill, two checkpoints and two images, on disk; a name and a message that would be markup."""
    store = Store.open(str(tmp_path / "run"))
    open_or_create(store, CONFIG | {"run": {"name": "<i>tale</i>"}})
    record(
        store,
        [
            *one_kill(),
            event(
                27.6,
                "failure",
                session="a",
                attempt=1,
                rank=1,
                kind="killed",
                action="restart",
                reason="<script>alert(1)</script>",
                details="",
                step=20,
            ),
            event(27.7, "validation", session="a", attempt=1, step=20, metrics={"loss": 0.75, "loss/ema/slow": 0.0625}),
        ],
    )
    for value in (10, 30):
        save(store, make_state(value), step=value, world_size=2)
    store.write(keys.CONFIG, [b"seed: 0 # <b>\n"])
    (tmp_path / "run" / "samples" / "0.999").mkdir(parents=True)
    for value in (10, 30):
        noise = np.random.default_rng(value).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(noise).save(tmp_path / "run" / "samples" / "0.999" / f"{value:06d}.png")
    return store


def test_the_page_is_whole_offline_and_has_the_values(run: Store):
    text = page(look(run), run)
    parsed = check(text)
    for value in (
        "finished",
        "57.7%",
        "52.0 s",
        "lost steps",
        "10",
        "killed",
        "0000000000300-0001",
        "stable",
        "loss/ema/slow",
        "0.0625",
        "seed: 0",
    ):
        assert any(value in piece for piece in parsed.texts), value
    assert text.count("data:image/png;base64,") == 2 and 'alt="0.999/000030.png"' in text
    assert text.count('class="restarted"') == 1 and 'class="redone"' in text
    assert "<i>tale</i>: finished" in "".join(parsed.texts), "shown, not obeyed"
    assert "&lt;script&gt;alert(1)" in text
    assert len(text) < 60_000


def test_a_run_with_no_step_and_one_with_no_event():
    store = new_store()
    text = page(look(store), store)
    check(text)
    assert "not started" in text and "No step is recorded yet" in text
    record(store, [started(0), attempt(3, 1)])
    seen = look(store, now=30)
    check(page(seen, store))
    assert seen.state is State.STARTING and seen.goodput.wall_s == 30 and seen.eta_s is None


def test_one_step_and_equal_losses():
    store = new_store()
    record(store, [started(0), attempt(1, 1), training(2, 1, 0), *steps(2, 1, [1])])
    text = page(look(store, now=4), store)
    check(text)
    assert re.search(r'<polyline points="0\.0,([\d.]+) 1000,\1"/>', text), "a line that can be seen"
    assert '<div class="steps"><span>1</span></div>' in text


def test_steps_without_a_finite_loss_are_said_and_not_drawn():
    seen = look(new_store())
    losses = [(1, 1.0), (2, None), (3, 1.0)]
    text = page(replace(seen, losses=Losses(losses)), new_store())
    assert "; 1 steps have no finite loss" in text and "<span>1</span><span>2</span><span>3</span></div>" in text
    assert "No step has a finite loss." in page(replace(seen, losses=Losses(losses[1:2])), new_store())


def test_a_run_of_100_000_steps_is_quick_and_small():
    store = new_store()
    events: list[Event] = [started(0), attempt(1, 1), training(2, 1, 0)]
    at, done, number = 2.0, 0, 1
    for value in range(200, 100_001, 200):
        events += [*steps(at, number, range(done + 1, value + 1), each=0.1)]
        at += 20.5
        events.append(snapshot(at, number, value, 0.5))
        done = value
        if value % 20_000 == 0 and value < 100_000:
            number += 1
            events += [down(at + 1), attempt(at + 2, number), training(at + 4, number, value)]
            at += 4
    events.append(finished(at + 1))
    thinned = [one for one in events if one.kind != "step" or one.fields["step"] % 200 in (0, 1)]
    record(store, [one for one in events if one.kind == "step"], "a" * 8)
    store.delete("events/0001-00000001-aaaaaaaa-0.jsonl")
    record(store, thinned, "b" * 8)
    begun = time.monotonic()
    seen = look(store, now=at)
    text = page(seen, store)
    took_s = time.monotonic() - begun
    assert took_s < 15 and len(text) < 200_000, (took_s, len(text))  # 1.5 s on an idle machine
    assert f">{seen.metrics[-1]['loss']:.4g} at step 100,000; dashed" in text, (
        "the step's own, not a point of the curve"
    )
    assert seen.losses.num_steps == 100_000 and len(seen.goodput.recoveries) == 4
    assert sum(seen.goodput.seconds.values()) == pytest.approx(seen.goodput.wall_s, rel=0.01)
    check(text)


def test_a_damaged_record_is_said_on_the_page(run: Store):
    run.write("metrics/0001-00000009-cccccccc-0.jsonl", [b'{"step": 31, "atte'])
    seen = look(run)
    assert seen.losses.num_steps == 30
    assert "cccccccc-0.jsonl: 1 lines are damaged" in page(seen, run) and len(as_json(seen)["damaged"]) == 1


def test_an_image_that_is_too_large_or_gone_does_not_matter(run: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.tracking.report._MOST_IMAGE_BYTES", 10)
    assert page(look(run), run).count("too large for this page") == 2


@pytest.mark.parametrize(
    ("events", "now", "state"),
    [
        ([], 0, State.NOT_STARTED),
        ([started(0)], 30, State.STARTING),
        (one_kill()[:6], 9, State.TRAINING),
        (one_kill()[:25], 28, State.RECOVERING),
        (one_kill()[:26], 28, State.RECOVERING),
        (one_kill()[:6], 500, State.SILENT),
        (one_kill(), 9999, State.FINISHED),
        ([started(0), event(1, "interrupted", session="a")], 9999, State.INTERRUPTED),
        ([started(0), event(1, "outcome", session="a", ending="gave up", message="why")], 9999, State.ENDED),
        ([*one_kill(), event(99, "already_finished", session="b", step=30, checkpoint="c")], 999, State.FINISHED),
    ],
)
def test_state(events: list[Event], now: float, state: State):
    store = new_store()
    if events:
        record(store, events)
    seen = look(store, now)
    assert seen.state is state
    assert seen.why == ("gave up: why" if state is State.ENDED else "")


def test_a_run_is_finished_since_it_finished_whoever_looked_later():
    store = new_store()
    record(store, [*one_kill(), event(999, "already_finished", session="b", step=30, checkpoint="c")])
    assert look(store, 9999).since_s == T0 + 52


def test_progress_is_of_the_attempt_that_owns_the_run():
    store = new_store()
    record(store, [*one_kill()[:-1]])
    seen = look(store, now=52)
    assert (seen.step, seen.num_steps, seen.world_size) == (30, 100, 2)
    assert seen.steps_per_s == pytest.approx(1.0) and seen.eta_s == pytest.approx(70.0)


def test_an_event_that_this_version_does_not_know_is_told_as_it_is():
    saved = event(2, "saved", step=3, bytes=1_234_567)
    lines = list(told([event(1, "new_kind", a=1), saved], 100, 8))
    assert [line for _, line in lines] == ["new_kind: a 1", "checkpoint of step 3 is committed: 1.2 MB, by attempt ?"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_shows_it_at_every_width(run: Store, tmp_path: Path, width: int, dark: bool):
    (tmp_path / "report.html").write_text(page(look(run), run))
    # A browser's own window has a least width; a frame has none, and can be asked how far its content reaches.
    frame = f'<body style="margin:0"><iframe src="report.html" style="width:{width}px;height:2400px;border:0" onload='
    frame += '"document.title = `reaches ${this.contentDocument.documentElement.scrollWidth}`"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    command = [
        *[str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"],
        *["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"],
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    target = (tmp_path / "frame.html").as_uri()
    document = subprocess.run([*command, "--dump-dom", target], capture_output=True, text=True, timeout=120, check=True)
    assert f"<title>reaches {width}</title>" in document.stdout, "something sticks out to the right"
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", target], capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(shot).convert("RGB"))[:, : min(width, 480)]
    assert (pixels[3, 3].mean() < 60) == dark, "the background follows the reader's choice"
    colors = {tuple(color) for color in pixels.reshape(-1, 3)[::7].tolist()}
    assert {(46, 158, 91), (214, 69, 69)} <= colors, "productive and lost time are drawn"
