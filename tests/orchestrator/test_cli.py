from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from orchestrator.cli import describe, main
from orchestrator.errors import GaveUpError, StorageError, SupersededError
from orchestrator.screen import stdout_writer
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError, DivergedError

CONFIG = """\
run: {name: tiny}
model:
  class_name: UNet2DModel
  args:
    sample_size: 8
    in_channels: 1
    out_channels: 1
    block_out_channels: [8, 16]
    down_block_types: [DownBlock2D, DownBlock2D]
    up_block_types: [UpBlock2D, UpBlock2D]
    norm_num_groups: 8
    num_class_embeds: 11
ema:
  slow: {decay: 0.99}
train: {num_steps: 4, global_batch_size: 8, microbatch_size: 2}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["--nope"], "No such option"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "none.yaml"], "none.yaml: No such file or directory"),
        (["train", "tiny.yaml", "train.num_step=3"], "did you mean train.num_steps?"),
        (["train", "tiny.yaml", "workers=9"], "workers=9 is more than the 4 microbatches"),
        (["train", "tiny.yaml", "ema.slow.decay=null"], "ema.slow.decay"),
        (["train", "tiny.yaml", "model.class_name=UNet2DMode"], "did you mean UNet2DModel"),
        (["train", "tiny.yaml", "model.args.out_channels=3"], "cannot take images"),
        (["config", "show", "tiny.yaml", "seed=x"], 'seed="x" is a text; give a whole number'),
        (["config", "validate", "tiny.yaml", "fast"], "'fast' is not of the form key=value"),
        (["config", "validate", "tiny.yaml", "storage=foo://x"], "storage='foo://x/tiny' cannot be opened"),
        (["config", "validate", "tiny.yaml", "model.args.norm_num_groups=7"], "is refused by UNet2DModel"),
        (["prove", "runs/a"], "Missing argument 'RUN_B'"),
        (["prove", "runs/a", "runs/b"], "no run at"),
        (["checkpoints", "list", "runs/a"], "no run at"),
        (["checkpoints", "list", "nope://a"], "storage='nope://a' cannot be opened"),
        (["checkpoints", "inspect", "runs/a", "--step", "x"], "'x' is not a valid integer"),
        (["checkpoints", "verify", "runs/a"], "no run at"),
        (["sample", "runs/a", "out.jpg"], "out.jpg does not end in .png"),
        (["sample", "runs/a", "out.png"], "no run at"),
        (["sample", "runs/a", "out.png", "--num", "0"], "0 is not in the range"),
        (["export", "runs/a", "out"], "no run at"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(config: str, args: list[str], message: str):
    result = unbroken(*args)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (click.Abort(), "interrupted; run the same command again to go on", 130),
        (ConfigError("seed=-1 is out of range"), "seed=-1 is out of range", 2),
        (StorageError("cannot read\n  s3://b/k"), "cannot read s3://b/k", 5),
        (SupersededError("attempt 1 is superseded"), "attempt 1 is superseded", 6),
        (GaveUpError("the same step failed 3 times"), "the same step failed 3 times", 4),
        (GaveUpError("what:  it\nwhere: there"), "what: it\nwhere: there", 4),
        (DivergedError("loss is NaN at step 3"), "loss is NaN at step 3", 3),
        (OSError(28, "No space left on device", "a/b"), "cannot go on: No space left on device (a/b); see to that", 5),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "cannot go on: No space left on device; see to that place",
            5,
        ),
        (SafetensorError("Error while deserializing header"), "unexpected SafetensorError: Error while", 1),
        (
            KeyError("x"),
            "unexpected KeyError: 'x'; a bug in unbroken: `unbroken --debug ...` shows where it comes from",
            1,
        ),
    ],
)
def test_every_error_has_its_line_and_code(error: Exception, line: str, code: int):
    found = describe(error)
    assert found[0].startswith(line) and found[1] == code and len(found[0].splitlines()) == len(line.splitlines())


def test_a_reader_that_is_gone_ends_a_command_in_silence(config: str, monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as end:
            main.main(["config", "show", config])
    assert end.value.code == 141


def test_streams_that_are_closed_and_a_folder_that_is_gone(tmp_path: Path):
    """Opened anew, or the next file that is opened would be what a child writes its output to."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = "import os, sys\nos.rmdir(os.getcwd())\nfrom orchestrator.cli import main\nmain(['config', 'show', 'x'])"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = partial(subprocess.run, shell=True, cwd=gone, env=environment, capture_output=True, text=True, check=False)
    told = run(f"{command} <&- >&-")
    assert (told.returncode, told.stdout) == (2, "") and len(told.stderr.splitlines()) == 1
    assert "the working directory has been removed; change to another one" in told.stderr
    gone.mkdir()
    assert run(f"{command} >&- 2>&-").returncode == 2


def test_another_broken_pipe_is_told(config: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def load(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("orchestrator.config.load_config", load)
    with pytest.raises(SystemExit) as end:
        main.main(["config", "show", config])
    assert end.value.code == 1 and "unexpected ConnectionError: [Errno 32]" in capfd.readouterr().err


def test_training_goes_on_when_nobody_reads(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        stdout_writer("step 1")
        stdout_writer("step 2")


def test_debug_shows_the_stack_trace(config: str):
    result = unbroken("--debug", "config", "show", "tiny.yaml", "seed=x")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and 'seed="x" is a text' in result.stderr.splitlines()[-1]


def test_show_prints_a_config_that_reads_back(config: str, tmp_path: Path):
    shown = unbroken("config", "show", config, "seed=7").stdout
    (tmp_path / "again.yaml").write_text(shown)
    assert unbroken("config", "show", "again.yaml").stdout == shown
    assert "seed: 7" in shown
    assert json.loads(unbroken("config", "show", config, "--json").stdout)["storage"] == "runs"


def test_show_trainers_only_is_what_trainers_read(config: str):
    result = unbroken("config", "show", config, "--trainers-only", "--json")
    assert decode(TrainerConfig, json.loads(result.stdout)).train.num_steps == 4


def test_a_file_without_an_end_is_no_bug(tmp_path: Path):
    (tmp_path / "deep.yaml").write_text(f"a: {'[' * 3000}{']' * 3000}")
    result = unbroken("config", "show", str(tmp_path / "deep.yaml"))
    assert result.exit_code == 2 and "lie in each other too deep" in result.stderr


def test_validate_says_what_would_run(config: str, tmp_path: Path):
    facts = json.loads(unbroken("config", "validate", config, "workers={min: 1, max: 2}", "--json").stdout)
    assert facts["run"] == f"{tmp_path}/runs/tiny"
    assert facts["workers"] == [1, 2] and facts["num_microbatches"] == 4
    assert "num_steps         4" in unbroken("config", "validate", config).stdout
    assert not (tmp_path / "runs").exists()


def test_help_is_quick_and_complete():
    """torch and ray take seconds to import: --help must not."""
    code = (
        "import sys\nfrom orchestrator.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nslow = {'torch', 'ray', 'diffusers', 'omegaconf', 'fsspec'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for word in ("train", "prove", "sample", "export", "checkpoints", "config", "Exit codes", "superseded"):
        assert word in result.stdout


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself(name: str):
    result = unbroken(name, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 6
