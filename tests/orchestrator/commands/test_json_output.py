"""`--json`: on every command that finds out or makes something, and then stdout is one document and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.commands.json_output import print_json
from orchestrator.jobs.job_server import Cluster
from tests.orchestrator.fake_jobs import FakeClient, cluster
from tests.orchestrator.tiny_run import CONFIG, make_run

WITHOUT = {
    "train": "what it made is the run: `status --json`",
    "logs": "it passes on what a job wrote",
}


def leaves(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_every_command_has_it():
    lack = {path for path, command in leaves(main) if all(one.name != "as_json" for one in command.params)}
    assert lack == WITHOUT.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    make_run(folder)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("status RUN", {"state", "step", "attempts"}),
        ("report RUN OUT.html", {"out", "size_bytes", "run", "state"}),
        ("runs list .", [{"url", "state", "step"}]),
        ("prove RUN RUN", {"equal", "num_tensors"}),
        ("checkpoints list RUN", [{"checkpoint", "state", "step"}]),
        ("checkpoints inspect RUN", {"format", "tensors"}),
        ("checkpoints verify RUN", [{"checkpoint", "verdict", "problems"}]),
        ("checkpoints prune RUN --dry-run", {"dry_run", "removed"}),
        ("checkpoints pin RUN 5", {"checkpoints", "changed"}),
        ("checkpoints unpin RUN 5", {"checkpoints", "changed"}),
        ("sample RUN OUT.png --num 1", {"out", "run", "step", "weights", "num_images"}),
        ("export RUN OUT --weights raw", {"out", "run", "step", "weights"}),
        ("config show CONFIG", {"run", "train"}),
        ("config validate CONFIG", {"run", "num_steps"}),
        ("ema advise CONFIG", {"profiles", "update_s"}),
        ("deploy render slurm CONFIG storage=s3://b/r --out OUT", {"out", "files"}),
        ("submit CONFIG", {"job", "status", "exit_code"}),
        ("resume RUN", {"job", "status", "exit_code"}),
        ("stop tiny", {"job", "status", "exit_code"}),
        ("jobs list", []),
    ],
)
def test_stdout_is_one_document(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, keys: set[str] | list[set[str]]
):
    client = FakeClient()
    client.add("tiny-a1", {"unbroken_run": "s3://b/tiny"}, "SUCCEEDED")
    monkeypatch.setattr(Cluster, "connect", staticmethod(lambda address: cluster(client)))
    monkeypatch.chdir(folder)
    names = {"RUN": "tiny", "CONFIG": "tiny.yaml", "OUT": str(tmp_path / "new")}
    result = CliRunner().invoke(main, [*(_named(word, names) for word in line.split()), "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    if isinstance(keys, list):
        assert isinstance(found, list) and all(want <= found[0].keys() for want in keys)
    else:
        assert keys <= found.keys()
        assert "out" not in keys or Path(found["out"]).exists()


def _named(word: str, names: dict[str, str]) -> str:
    stem, dot, suffix = word.partition(".")
    return f"{names[stem]}{dot}{suffix}" if stem in names else word


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]):
    print_json({"a": [float("nan"), 1.5], "b": (float("inf"),)}, indent=None)
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": [null]}\n'
