"""The journal: each step once, whatever is torn, repeated or sent twice."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.messages.attempts import Event
from orchestrator.tracking.journal import Journal, encode, follow, last_opened
from tests.orchestrator.tracking.made_up import attempt, event, opened


def write(path: Path, session: str, *events: Event) -> None:
    journal = Journal(path)
    for number, one in enumerate(events):
        journal.append(encode(one, session, number))
    journal.close()


def read(path: Path) -> list[Event]:
    size = path.stat().st_size
    return [found for found, _ in follow(path, lambda: size)]


def steps(path: Path) -> list[int]:
    return [found.fields["step"] for found in read(path) if found.kind == "step"]


def test_repeated_steps_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", opened(tmp_path), *attempt(1, 0, 10), event("validation", step=10, metrics={}))
    write(path, "b", opened(tmp_path), *attempt(2, 5, 12), event("validation", step=10, metrics={}))
    assert steps(path) == list(range(1, 13))
    assert [found.kind for found in read(path)].count("validation") == 1
    assert [found.fields["attempt"] for found in read(path) if found.kind == "attempt"] == [1, 2]


def test_samples_are_told_apart_by_their_title(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", *(event("samples", step=5, path="x", title=title) for title in ("raw", "ema", "raw")))
    assert [found.fields["title"] for found in read(path)] == ["raw", "ema"]


def test_what_is_sent_again_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [opened(tmp_path), *attempt(1, 0, 3), event("failure", kind="killed")]
    write(path, "a", *events)
    write(path, "a", *events, event("agent_lost", rank=1))
    assert [found.kind for found in read(path)] == [*(one.kind for one in events), "agent_lost"]


def test_what_found_no_room_is_written_when_it_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    first, second, again = (
        encode(event("step", attempt=attempt, step=step, metrics={}), "a", number)
        for number, (attempt, step) in enumerate([(1, 1), (1, 2), (2, 2)])
    )
    journal.append(first)
    with monkeypatch.context() as patch:
        full = SimpleNamespace(fileno=journal._file.fileno, write=lambda line: 3)
        patch.setattr(journal, "_file", full)
        with pytest.raises(OSError, match="no space left"):
            journal.append(second)
    journal.append(again)  # made once more by the next attempt
    journal.append(second)
    journal.close()
    assert [(found.fields["attempt"], found.fields["step"]) for found in read(path)] == [(1, 1), (2, 2)]


def test_with_rewind_repeated_steps_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", opened(tmp_path, rewind=True), *attempt(1, 0, 4), *attempt(2, 2, 5))
    assert steps(path) == [1, 2, 3, 4, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_line_is_removed_and_its_step_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", *attempt(1, 0, 4))
    path.write_bytes(path.read_bytes()[:-cut])
    write(path, "b", *attempt(2, 3, 6))
    assert steps(path) == list(range(1, 7))


def test_a_follower_stops_where_its_journal_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", opened(tmp_path), *attempt(1, 0, 3))
    end = path.stat().st_size
    write(path, "b", opened(tmp_path), *attempt(2, 3, 6))
    assert [found.fields["step"] for found, _ in follow(path, lambda: end) if found.kind == "step"] == [1, 2, 3]


def test_the_newest_introduction_counts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", opened(tmp_path, project="old"))
    write(path, "b", opened(tmp_path, project="new"), *attempt(1, 0, 1))
    found = last_opened(path)
    assert found is not None and found.fields["tracking"]["wandb"]["project"] == "new"


@pytest.mark.parametrize("damaged", [b"\0\0\0\n", b'{"kind": "step"}\n', b"7\n", b'{"time_s": 1.5, "ki\xf0nd": 1}\n'])
def test_a_damaged_line_is_passed_over(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", opened(tmp_path), *attempt(1, 0, 4))
    with path.open("ab") as file:
        file.write(damaged)
    write(path, "b", *attempt(2, 3, 6))
    assert steps(path) == list(range(1, 7))


def test_the_newest_introduction_is_found_without_holding_all_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "a", opened(tmp_path), *attempt(1, 0, 20_000))
    write(path, "b", opened(tmp_path, tensorboard=True), *attempt(2, 20_000, 20_010))
    tracemalloc.start()
    found = last_opened(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is not None and found.fields["tracking"]["tensorboard"] is True
    assert peak < path.stat().st_size / 4, "one event at a time"
