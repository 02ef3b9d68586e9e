from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import list_checkpoints, quarantine
from orchestrator.checkpoint.keys import CheckpointRef, attempt_key
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.retention import claim_fields
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from tests.orchestrator.checkpoint.retained import leave_upload
from tests.orchestrator.checkpoint.states import SPECS, make_state, save


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with stable checkpoints of steps 1 and 2 and a save that was never committed."""
    url = str(tmp_path / "run")
    store = Store.open(url)
    open_or_create(store, {})
    for step in (1, 2):
        save(store, make_state(step), step=step, world_size=2)
    assert [claim_attempt(store, {}) for _ in range(2)] == [1, 2]
    store.write("checkpoints/0000000000030-0001/shard-00000-of-00002.safetensors", [b"half of a save"])
    return url


def damage(run: str, checkpoint: str) -> None:
    (shard, *_) = sorted((Path(run) / "checkpoints" / checkpoint).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_list_shows_every_checkpoint_newest_first(run: str):
    header, *lines = unbroken("checkpoints", "list", run).stdout.splitlines()
    assert header.split() == ["CHECKPOINT", "STATE", "STEP", "WORKERS", "STRATEGY", "SIZE_MB", "CREATED_AT", "KEPT"]
    assert [line.split()[:3] for line in lines] == [
        ["0000000000030-0001", "writing", "-"],
        ["0000000000020-0001", "stable", "2"],
        ["0000000000010-0001", "stable", "1"],
    ]
    rows = json.loads(unbroken("checkpoints", "list", run, "--json").stdout)
    assert [(row["state"], row["step"], row["workers"]) for row in rows] == [
        ("writing", None, None),
        ("stable", 2, 2),
        ("stable", 1, 2),
    ]
    assert [(row["keep"], row["kept"], row["pinned"], row["expired"]) for row in rows] == [
        (False, "no: never committed by attempt 1", None, False),
        (True, "newest stable", None, False),
        (True, "newest 10", None, False),
    ]


def test_inspect_shows_the_newest_stable_one_or_the_one_asked_for(run: str):
    newest = unbroken("checkpoints", "inspect", run).stdout
    assert "step           2 (20 samples)" in newest
    assert all(spec.name in newest for spec in SPECS)
    manifest = json.loads(unbroken("checkpoints", "inspect", run, "--step", "1", "--json").stdout)
    assert manifest["progress"]["step"] == 1


def test_inspect_names_the_steps_there_are(run: str):
    result = unbroken("checkpoints", "inspect", run, "--step", "9")
    assert result.exit_code == 2 and "step=9 has no checkpoint in" in result.stderr
    assert result.stderr.endswith("there are steps 1, 2\n")


def test_verify_reads_everything(run: str):
    result = unbroken("checkpoints", "verify", run)
    assert result.exit_code == 0
    assert [line.split("  ")[1] for line in result.stdout.splitlines()] == ["not committed", "intact", "intact"]


def test_verify_finds_one_bit_and_changes_nothing(run: str):
    damage(run, "0000000000020-0001")
    result = unbroken("checkpoints", "verify", run)
    assert result.exit_code == 3
    assert "0000000000020-0001  damaged" in result.stdout and "0000000000010-0001  intact" in result.stdout
    (only,) = json.loads(unbroken("checkpoints", "verify", run, "--step", "2", "--json").stdout)
    assert only["verdict"] == "damaged" and only["problems"]
    assert unbroken("checkpoints", "verify", run, "--step", "1").exit_code == 0
    assert not list(Path(run).rglob("quarantine.json"))


def stable_steps(run: str) -> list[int]:
    return [info.step for info in list_checkpoints(Store.open(run)) if info.manifest]


def test_prune_removes_what_is_superfluous_and_says_why(run: str):
    first = "0000000000010-0001  {}: older than the newest 1"
    litter = "0000000000030-0001  {}: never committed by attempt 1"
    dry = unbroken("checkpoints", "prune", run, "--last", "1", "--dry-run")
    assert dry.stdout.splitlines() == [line.format("would be removed") for line in (litter, first)]
    assert stable_steps(run) == [2, 1]
    assert unbroken("checkpoints", "prune", run, "--dry-run").stdout.splitlines() == [litter.format("would be removed")]
    done = unbroken("checkpoints", "prune", run, "--last", "1", "--grace-s", "0")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [line.format("removed") for line in (litter, first)]
    assert stable_steps(run) == [2] and not list(Path(run).rglob("0000000000010-0001/*"))
    assert unbroken("checkpoints", "prune", run).stdout == "nothing to remove\n"
    again = json.loads(unbroken("checkpoints", "prune", run, "--json").stdout)
    assert again == {"dry_run": False, "removed": []}


def test_prune_lets_readers_finish(run: str, monkeypatch: pytest.MonkeyPatch):
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        assert stable_steps(run) == [2, 1]
        assert unbroken("checkpoints", "inspect", run, "--step", "1").exit_code == 2, "nobody begins"

    monkeypatch.setattr("orchestrator.commands.checkpoints.time.sleep", sleep)
    monkeypatch.setattr("orchestrator.checkpoint.retention.Pruner.__init__.__defaults__", (lambda: sum(naps),))
    rows = json.loads(unbroken("checkpoints", "prune", run, "--last", "1", "--grace-s", "2.5", "--json").stdout)
    assert naps == [1.0, 1.0, 0.5] and stable_steps(run) == [2]
    assert [row["checkpoint"] for row in rows["removed"]] == ["0000000000030-0001", "0000000000010-0001"]


def test_pin_keeps_and_unpin_lets_go(run: str):
    assert unbroken("checkpoints", "pin", run, "1", "--reason", "the paper").stdout.endswith("0010-0001 is pinned\n")
    again = unbroken("checkpoints", "pin", run, "1", "--reason", "another")
    assert again.stdout == "0000000000010-0001 was pinned already: the paper\n"
    assert "pinned         the paper" in unbroken("checkpoints", "inspect", run, "--step", "1").stdout
    assert "pinned: the paper" in unbroken("checkpoints", "list", run).stdout
    unbroken("checkpoints", "prune", run, "--last", "1", "--grace-s", "0")
    assert stable_steps(run) == [2, 1]
    gone = json.loads(unbroken("checkpoints", "unpin", run, "1", "--json").stdout)
    assert gone == {"checkpoints": ["0000000000010-0001"], "changed": True}
    assert unbroken("checkpoints", "unpin", run, "1").stdout == "no checkpoint of step 1 was pinned\n"
    unbroken("checkpoints", "prune", run, "--last", "1", "--grace-s", "0")
    assert stable_steps(run) == [2]
    assert unbroken("checkpoints", "pin", run, "1").exit_code == 2


def test_a_quarantined_checkpoint_can_be_unpinned_and_leaves_no_folder(run: str):
    unbroken("checkpoints", "pin", run, "1")
    ref = CheckpointRef(10, 1)
    quarantine(Store.open(run), ref, "rotten", attempt=1)
    assert unbroken("checkpoints", "unpin", run, "1").stdout == f"{ref} is no longer pinned\n"
    unbroken("checkpoints", "prune", run, "--last", "1", "--grace-s", "0")
    assert not (Path(run) / ref.folder).exists()


def test_prove_says_the_same_or_names_the_first_difference(run: str, tmp_path: Path):
    other = str(tmp_path / "other")
    store = Store.open(other)
    open_or_create(store, {})
    save(store, make_state(1), step=1, world_size=3)
    same = unbroken("prove", run, other)
    assert same.exit_code == 0
    assert same.stdout.startswith(f"bitwise the same: {len(SPECS)} tensors in 1 checkpoints up to step 1")
    save(store, make_state(99), step=2)
    different = unbroken("prove", run, other)
    assert different.exit_code == 3 and different.stdout.startswith("different: step 2, ema/main/proj.weight: ")
    assert json.loads(unbroken("prove", run, other, "--json").stdout)["equal"] is False


def test_prune_does_not_wait_for_an_upload_that_may_have_been_left_behind(run: str, monkeypatch: pytest.MonkeyPatch):
    leave_upload(Store.open(run), "events", age_s=20 * 3600)
    monkeypatch.setattr(
        "orchestrator.commands.checkpoints.time.sleep", lambda seconds: pytest.fail("it waits for hours")
    )
    result = unbroken("checkpoints", "prune", run, "--json")
    assert result.exit_code == 0 and len(json.loads(result.stdout)["removed"]) == 1


def test_prune_and_list_keep_what_a_rollback_could_go_back_to(run: str):
    claim_attempt(Store.open(run), claim_fields(RetentionConfig(last=1), undo_steps=1))
    kept = [row["kept"] for row in json.loads(unbroken("checkpoints", "list", run, "--json").stdout)]
    assert kept[1:] == ["newest stable", "for a rollback"]
    unbroken("checkpoints", "prune", run, "--grace-s", "0")
    assert stable_steps(run) == [2, 1]
    unbroken("checkpoints", "prune", run, "--grace-s", "0", "--last", "1")
    assert stable_steps(run) == [2], "as it was asked for"


@pytest.mark.parametrize("command", ["list", "prune"])
def test_the_newest_claim_is_read_once(run: str, command: str, monkeypatch: pytest.MonkeyPatch):
    attempt = claim_attempt(Store.open(run), claim_fields(RetentionConfig(last=1)))
    asked, read, list_ = [], Store.read, Store.list
    monkeypatch.setattr(Store, "read", lambda self, key, *span: (asked.append(key), read(self, key, *span))[1])
    monkeypatch.setattr(Store, "list", lambda self, folder: (asked.append(folder), list_(self, folder))[1])
    assert unbroken("checkpoints", command, run, *(["--dry-run"] if command == "prune" else [])).exit_code == 0
    assert [key for key in asked if key.startswith("attempts")] == ["attempts", attempt_key(attempt)]


def test_prune_waits_for_readers_also_by_a_clock_that_goes_on(run: str):
    result = unbroken("checkpoints", "prune", run, "--last", "1", "--grace-s", "0.3")
    assert result.exit_code == 0 and stable_steps(run) == [2]
