"""Every command that takes a RUN, and every kind of thing that is none: one line, its exit code, nothing changed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
import yaml
from click.testing import CliRunner

from orchestrator.checkpoint.manifest import FORMAT
from orchestrator.cli import main
from tests.orchestrator.tiny_run import CONFIG, make_run
from tests.s3.server import free_ports

COMMANDS = (
    "status RUN",
    "report RUN out.html",
    "prove RUN RUN",
    "sample RUN out.png",
    "export RUN out",
    "evaluate RUN --network net.pt2",
    "ema synthesize RUN --sigma-rel 0.1",
    "tracking sync RUN",
    "resume RUN --here",
    *(f"checkpoints {name} RUN" for name in ("list", "inspect", "verify", "prune --dry-run")),
    *(f"checkpoints {name} RUN 5" for name in ("pin", "unpin")),
)
CONFIG_READERS = {"sample", "export", "evaluate", "ema", "tracking", "resume"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_run(tmp_path_factory.mktemp("whole")))


def edit(run: Path, change: Callable[[dict], object]) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


def as_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("no run")


def as_empty_folder(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def of_a_newer_format(run: Path) -> None:
    for path in run.glob("checkpoints/*/manifest.json"):
        body, lead, _ = path.read_bytes().rpartition(b',\n  "digest": "')
        body = body.replace(FORMAT.encode(), b"unbroken-9")
        path.write_bytes(body + lead + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n')


BROKEN = {
    "gone": (shutil.rmtree, 2, "no run at"),
    "file": (as_file, 2, "no run at"),
    "empty": (as_empty_folder, 2, "no run at"),
    "cut": (lambda run: (run / "run.json").write_text('{"run_id": "01'), 3, "run.json is damaged"),
    "list": (
        lambda run: edit(run, lambda record: record.update(config=[])),
        3,
        "is damaged (its config is no section)",
    ),
    "newer": (lambda run: edit(run, lambda record: record.update(flavour=1)), 2, "does not know its flavour; update"),
    "newer-format": (of_a_newer_format, 2, "has the format 'unbroken-9', this version of unbroken reads"),
    "newer-config": (lambda run: edit(run, lambda r: r["config"].update(warp=9)), 2, "of another version of unbroken"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_run_is_told_in_one_line(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    run = tmp_path / "ein Lauf ü"
    shutil.copytree(whole, run)
    breaking, code, words = BROKEN[kind]
    breaking(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.preflight.check_trainable", lambda config: None)
    before = sorted(tmp_path.rglob("*"))
    for line in COMMANDS:
        name = line.split()[0]
        if (kind == "newer-config") != (name in CONFIG_READERS) and kind.startswith("newer-"):
            continue  # who needs no config reads the run as ever; who refuses the config asks for no checkpoint
        result = CliRunner().invoke(main, [str(run) if word == "RUN" else word for word in line.split()])
        assert (result.exit_code, result.stdout) == (code, ""), (line, result.output)
        assert words in result.stderr and str(run) in result.stderr, (line, result.stderr)
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("status s3://", 2, "storage='s3://' names no bucket"),
        ("status ~nobody-of-this-name/x", 2, "no run at"),
        ("status nope://x", 2, "cannot be opened"),
        ("sample RUN file/grid.png", 2, "cannot write to file"),
        ("sample RUN . --num 1", 2, "File '.' is a directory"),
        ("export RUN out --max-shard-size big", 2, "'big' is no size; write 500MB or 10GB"),
        ("export RUN file", 2, "cannot write to file"),
        ("report RUN file/page.html", 2, "cannot write file/page.html"),
        ("deploy render slurm CONFIG storage=s3://b/r --out file", 2, "cannot write to file"),
        ("runs list file", 2, "file is a file"),
        ("tracking sync RUN --dir file", 2, "file/events.jsonl does not exist"),
        ("logs x --address http://127.0.0.1:9", 3, "no job server answers at http://127.0.0.1:9"),
        ("chaos CONFIG --address 127.0.0.1:9", 3, "no Ray cluster answers at 127.0.0.1:9 (Connection refused)"),
    ],
)
def test_a_place_that_is_none_is_told_in_one_line(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, words: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    names = {"RUN": str(whole), "CONFIG": str(Path(__file__).parents[3] / "configs/digits.yaml")}
    result = CliRunner().invoke(main, [names.get(word, word) for word in line.split()])
    assert result.exit_code == code and words in result.stderr, result.output
    assert len(result.stderr.splitlines()) == 1 and (tmp_path / "file").read_text() == "mine"


def test_a_list_of_runs_survives_those_that_cannot_be_read(whole: Path, tmp_path: Path):
    for kind, (breaking, *_) in BROKEN.items():
        shutil.copytree(whole, tmp_path / kind)
        breaking(tmp_path / kind)
    (tmp_path / "theirs" / "run.json").mkdir(parents=True)  # to read it fails, as it does without the right to
    found = json.loads(CliRunner().invoke(main, ["runs", "list", str(tmp_path), "--json"]).stdout)
    assert {Path(one["url"]).name: one["state"] for one in found} == {
        "cut": "damaged",
        "list": "damaged",
        "newer": "of another version",
        "newer-format": "of another version",
        "newer-config": "not started",
        "theirs": "unreadable",
    }


@pytest.fixture
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint of S3 at which nobody listens."""
    (port,) = free_ports(1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("orchestrator.checkpoint.store.REACH_S", 0.1)
    return f"http://127.0.0.1:{port}"


def test_a_store_that_does_not_answer_is_told_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody_there: str):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr("orchestrator.commands.train.train_here", lambda config: None)
    names = ("status", "prove", "sample", "ema", "tracking", "resume", "checkpoints list")  # one for each way in
    lines = [line for line in COMMANDS if line.startswith(names)]
    lines += ["runs list RUN", "doctor tiny.yaml storage=RUN", "train tiny.yaml storage=RUN"]
    for line in (*lines, "config validate tiny.yaml data.source=folder data.image_size=8 data.path=RUN"):
        name = line.split()[0]
        began = time.monotonic()
        result = CliRunner().invoke(main, line.replace("RUN", "s3://b/run").split())
        assert time.monotonic() - began < 20, line
        said = result.stdout if name == "doctor" else result.stderr
        assert "cannot reach s3://b/run" in said and nobody_there in said and "AWS_ENDPOINT_URL_S3" in said, said
        assert result.exit_code == (0 if name == "train" else 5), (line, result.output)
        assert name == "doctor" or len(result.stderr.splitlines()) == 1
