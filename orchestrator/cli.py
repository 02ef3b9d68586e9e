"""The command `unbroken`: its groups, and how an error becomes one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import re
import select
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click

from orchestrator.commands.chaos import chaos
from orchestrator.commands.checkpoints import checkpoints
from orchestrator.commands.config import config
from orchestrator.commands.data import data
from orchestrator.commands.deploy import deploy
from orchestrator.commands.doctor import doctor
from orchestrator.commands.ema import ema
from orchestrator.commands.evaluate import evaluate
from orchestrator.commands.jobs import jobs, logs, stop
from orchestrator.commands.prove import prove
from orchestrator.commands.runs import runs
from orchestrator.commands.status import report, status
from orchestrator.commands.submit import resume, submit
from orchestrator.commands.sweep import sweep
from orchestrator.commands.tracking import tracking
from orchestrator.commands.train import train
from orchestrator.commands.weights import export, sample, unpack
from orchestrator.errors import GaveUpError, UnbrokenError
from trainers.errors import ConfigError, TrainersError

_UNREAD_CODE = 128 + signal.SIGPIPE
_EPILOG = """\
\b
Exit codes:
  0    done
  1    an error nobody foresaw: a bug in unbroken
  2    usage, configuration or data; mostly told before anything starts
  3    the run or command failed; `prove` or `verify` found a difference; `chaos` a fault that was not recovered from
  4    gave up: the failure policy ended the run, with its reason
  5    storage did not do what was asked
  6    superseded: a newer attempt owns the run
  130  interrupted (Ctrl-C); the same command goes on
  141  nobody reads the output any more (unbroken ... | head); training goes on all the same
  143  terminated (SIGTERM), or its job was stopped; the same command goes on

\b
Shell completion, for the start-up file of your shell:
  bash  eval "$(_UNBROKEN_COMPLETE=bash_source unbroken)"
  zsh   eval "$(_UNBROKEN_COMPLETE=zsh_source unbroken)"
  fish  _UNBROKEN_COMPLETE=fish_source unbroken | source
"""


class _Cli(click.Group):
    """Prints every error as one line on stderr and exits with its documented code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # which click takes for a reader that is gone, whatever pipe it was
            if not any(map(_reader_is_gone, (sys.stdout, sys.stderr))):
                raise ConnectionError(str(error)) from error
            raise click.exceptions.Exit(_UNREAD_CODE) from None
        except Exception:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs = {"prog_name": "unbroken", **kwargs, "standalone_mode": False}
        _reopen_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without our blocks, a name that is no UTF-8
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except Exception as error:
            line, code = describe(error)
            with suppress(OSError):
                click.echo(f"error: {line}", err=True)
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        sys.exit(code if isinstance(code, int) else 0)


def _reopen_closed_streams() -> None:
    """Where one is closed (`>&-`), the next file that is opened takes its number, and what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, mode)
            os.set_inheritable(nowhere.fileno(), True)  # a child's output goes there too
            setattr(sys, name, nowhere)


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether `stream` is a pipe that nobody reads from any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush(stream: TextIO) -> None:
    """Or Python would try it when it ends, complain, and change the exit code."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def describe(error: Exception) -> tuple[str, int]:
    """What a user reads about `error`, on one line where it is not a bug of theirs, and the exit code."""
    # A bug that ends the run is told in three lines: what, where, which samples.
    lines = str(error).splitlines() if isinstance(error, GaveUpError) else [str(error)]
    text = "\n".join(" ".join(line.split()) for line in lines)
    error = _as_os_error(error)
    match error:
        case click.Abort():
            return "interrupted; run the same command again to go on", 130
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "unbroken"
            return f"{' '.join(error.format_message().split()).rstrip('.')}; see `{where} --help`", 2
        case click.ClickException():
            return " ".join(error.format_message().split()), 2
        case ConfigError():
            return text, 2
        case UnbrokenError():
            return text, error.exit_code
        case TrainersError():
            return text, 3
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOSPC | errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            return f"cannot go on: {error.strerror}{where}; see to that place, then run the same command again", 5
    kind = type(error).__name__
    return f"unexpected {kind}: {text}; a bug in unbroken: `unbroken --debug ...` shows where it comes from", 1


def _as_os_error(error: Exception) -> Exception:
    """safetensors wraps what the system refuses in an error of its own, with the number in its text."""
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else error


@click.group(cls=_Cli, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the stack trace of an error. Stands before the command.")
@click.version_option(package_name="unbroken")
def main(debug: bool) -> None:
    """Diffusion training that nothing breaks.

    A run that is killed, restarted or resized ends in bitwise the weights, EMA and optimizer state of a run that
    nothing happened to, and `unbroken prove` shows it.

    \b
    Start here:
      unbroken config show configs/digits.yaml          every key with its value
      unbroken doctor configs/digits.yaml               can this machine and this store run it?
      unbroken train configs/digits.yaml                train, or go on where a run was left
      unbroken train configs/digits.yaml seed=1 run.name=second
      unbroken submit configs/digits.yaml --address http://head:8265      the same on a Ray cluster
      unbroken status runs/digits --watch                how far it is, what failures cost
      unbroken sample runs/digits samples.png           images from the EMA weights
      unbroken prove runs/digits runs/second            are two runs bitwise the same?

    A RUN is a folder or URL, <storage>/<run.name>: runs/digits, s3://bucket/prefix/digits.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise click.UsageError("the working directory has been removed; change to another one") from None


for command in (
    *(train, sweep, submit, resume, logs, stop, jobs, status, runs, report, prove, chaos),
    *(sample, evaluate, export, unpack, ema, checkpoints, tracking, data, config, doctor, deploy),
):
    main.add_command(command)
