"""The command `unbroken`: its groups, and how an error becomes one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from typing import Any, NoReturn

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

_EPILOG = """\
\b
Exit codes:
  0    done
  1    an error nobody foresaw: a bug in unbroken
  2    usage or configuration: nothing was started
  3    the run failed; `prove` or `verify` found a difference; `chaos` a fault that was not recovered from
  4    gave up: the failure policy ended the run, with its reason
  5    storage did not do what was asked
  6    superseded: a newer attempt owns the run
  130  interrupted (Ctrl-C); the same command goes on
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
        except Exception:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs = {"prog_name": "unbroken", **kwargs, "standalone_mode": False}
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except Exception as error:
            line, code = describe(error)
            click.echo(f"error: {line}", err=True)
        sys.exit(code if isinstance(code, int) else 0)


def describe(error: Exception) -> tuple[str, int]:
    """What a user reads about `error`, on one line where it is not a bug of theirs, and the exit code."""
    # A bug that ends the run is told in three lines: what, where, which samples.
    lines = str(error).splitlines() if isinstance(error, GaveUpError) else [str(error)]
    text = "\n".join(" ".join(line.split()) for line in lines)
    match error:
        case click.Abort():
            return "interrupted; run the same command again to go on", 130
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else "unbroken"
            return f"{' '.join(error.format_message().split())}; see `{where} --help`", 2
        case click.ClickException():
            return " ".join(error.format_message().split()), 2
        case ConfigError():
            return text, 2
        case UnbrokenError():
            return text, error.exit_code
        case TrainersError():
            return text, 3
    kind = type(error).__name__
    return f"unexpected {kind}: {text}; a bug in unbroken: `unbroken --debug ...` shows where it comes from", 1


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


for command in (
    *(train, sweep, submit, resume, logs, stop, jobs, status, runs, report, prove, chaos),
    *(sample, evaluate, export, unpack, ema, checkpoints, tracking, data, config, doctor, deploy),
):
    main.add_command(command)
