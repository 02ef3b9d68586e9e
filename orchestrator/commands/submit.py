"""`unbroken submit | resume`: a run as a job of a Ray cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands.jobs import ADDRESS, describe_job
from orchestrator.commands.json_output import JSON, print_json
from orchestrator.commands.train import train_here

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.jobs.job_server import Job


def _submit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        JSON,
        click.option(
            "--command",
            default="unbroken",
            show_default=True,
            help="How the cluster calls unbroken: /opt/venv/bin/unbroken, python -m orchestrator.",
        ),
        click.option(
            "--env", "environment", multiple=True, metavar="NAME=VALUE", help="For the job; never a secret. Repeatable."
        ),
        click.option(
            "--supervise", is_flag=True, help="Stay, and submit the next job when a driver or the head node is lost."
        ),
        click.option(
            "--follow/--no-follow",
            default=True,
            show_default=True,
            help="Show what the job writes until it ends. Ctrl-C leaves the job running.",
        ),
        ADDRESS,
    ):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How to submit."""

    address: str | None
    follow: bool
    supervise: bool
    environment: tuple[str, ...]
    command: str
    as_json: bool

    def __post_init__(self) -> None:
        if self.supervise and not self.follow:
            raise click.UsageError("--supervise has to follow the job: leave out --no-follow")
        for text in self.environment:
            if not text.partition("=")[1] or not text.partition("=")[0]:
                raise click.UsageError("--env takes NAME=VALUE, such as --env OMP_NUM_THREADS=1")


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--working-dir",
    default=".",
    show_default=True,
    metavar="DIR|URI",
    help="What travels to the cluster, or where it is already: https://, s3:// or gs:// of a zip file.",
)
@_submit_options
def submit(config: str, overrides: tuple[str, ...], working_dir: str, **options: Any) -> int:
    """Train a run, or go on with it, as a job of a Ray cluster.

    The same as `unbroken train` there: the config is checked here first, then the working directory is packed and
    a job <run.name>-a<n> submitted. If a job of this run lives, this attaches to it. So the same command is right
    after every interruption.

    \b
      unbroken submit configs/digits.yaml --address http://head:8265
      unbroken submit configs/digits.yaml workers=4 storage=s3://bucket/runs --supervise
      unbroken submit configs/digits.yaml --no-follow --json

    Not packed: .git, .venv, venv, __pycache__, runs, wandb, what .gitignore and .rayignore name, and places of
    secrets (.env, .netrc, .aws, .ssh, .kube). Ray takes at most 512 MiB. On a cluster of several nodes `storage` must
    be a URL, or an absolute path that all nodes mount.

    Secrets do not travel: set them on the nodes of the cluster. Whatever looks like one is refused by its name.

    The exit code is that of `unbroken train` in the job; 143 if the job was stopped; 3 if its driver was lost with its
    node, 128 + n if signal n ended it; 126 or 127 if the cluster cannot start unbroken. With --supervise the next job
    is submitted after a loss, but not after exit codes 0, 2, 4, 6, 126 and 127.
    """
    chosen = _Options(**options)
    from orchestrator.config import load_config
    from orchestrator.preflight import check_trainable

    loaded = load_config(config, overrides)
    check_trainable(loaded)
    return _launch(loaded, Path(config), overrides, working_dir, chosen)


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--here", is_flag=True, help="Train in this process, as `unbroken train` does, instead of submitting.")
@click.option("--working-dir", metavar="DIR", help="Travels with the job. Default: only the config.")
@_submit_options
def resume(run: str, overrides: tuple[str, ...], here: bool, working_dir: str | None, **options: Any) -> int | None:
    """Go on with RUN, from the config that is kept in its folder.

    For when the config file is not at hand: `unbroken train` and `unbroken submit` resume as well. The config is the
    one that RUN was first started with; give what should differ as KEY=VALUE.

    \b
      unbroken resume s3://bucket/runs/digits --address http://head:8265
      unbroken resume runs/digits --here workers=1
    """
    chosen = _Options(**options)
    for text in overrides:
        if text.startswith(("storage=", "run.name=")):
            raise click.UsageError(f"{text} contradicts RUN, which says where the run is; leave it out")
    from orchestrator.checkpoint.store import Store
    from orchestrator.config import load_config, override, to_yaml
    from orchestrator.preflight import check_trainable
    from orchestrator.run_identity import config_of

    store = Store.reach(run)
    found = config_of(store)
    storage, _, name = store.url.rpartition("/")
    with tempfile.TemporaryDirectory(prefix="unbroken-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(_found_at(found, storage)), encoding="utf-8")
        overrides = (*overrides, override("storage", storage), override("run.name", name))
        loaded = load_config(path, overrides)
        check_trainable(loaded)
        if here:
            return train_here(loaded)
        return _launch(loaded, path, overrides, working_dir or folder, chosen)


def _found_at(config: RunConfig, storage: str) -> RunConfig:
    """`config` with the tier that takes the place of `storage`, if it has one, where the run was found."""
    tiers = tuple(
        tier if tier is not config.checkpoint.storage else replace(tier, url=storage)
        for tier in config.checkpoint.tiers
    )
    return replace(config, storage=storage, checkpoint=replace(config.checkpoint, tiers=tiers)) if tiers else config


def _launch(config: RunConfig, path: Path, overrides: tuple[str, ...], working_dir: str, options: _Options) -> int:
    from orchestrator.jobs import submission
    from orchestrator.jobs.job_request import Source, prepare
    from orchestrator.jobs.job_server import Cluster

    def say(line: str) -> None:
        write(f"{line}\n")

    def write(text: str) -> None:
        # Who supervises a run goes on when nobody reads what it says; else the reader has seen enough.
        with suppress(OSError) if options.supervise else nullcontext():
            click.echo(text, nl=False, err=options.as_json)

    pairs = dict(text.split("=", 1) for text in options.environment)
    source = Source(
        config=config,
        path=path,
        overrides=overrides,
        working_dir=working_dir,
        environment=pairs,
        command=options.command,
    )
    cluster = Cluster.connect(options.address)
    with tempfile.TemporaryDirectory(prefix="unbroken-") as scratch:
        request, notes = prepare(source, cluster.num_nodes(), Path(scratch))
        for note in notes:
            say(note)
        try:
            if options.supervise:
                job = submission.supervise(cluster, request, write, say)
            else:
                job, new = submission.submit_or_attach(cluster, request)
                say(f"{job.id}: {'submitted' if new else 'runs already; attached, nothing was submitted'}")
                if options.follow:
                    cluster.follow(job.id, write)
                    job = cluster.job(job.id)
        except KeyboardInterrupt:
            say(f"\nthe job goes on: unbroken logs {config.run.name} -f, unbroken stop {config.run.name}")
            raise
    return _conclude(job, request.run_url, options, say)


def _conclude(job: Job | None, run: str, options: _Options, say: Callable[[str], None]) -> int:
    """Say how it ended; the exit code."""
    from orchestrator.jobs.submission import NOT_THERE_CODES, exit_code, needs_another

    code = exit_code(job) if options.follow else 0
    if options.follow:
        ended = f"{job.id}: {job.status}" if job else "the cluster does not know the job any more"
        then = "; the same command goes on, with --supervise by itself" if job is None or needs_another(job) else ""
        if code in NOT_THERE_CODES:
            then = f"; the cluster cannot start `{options.command}`: install unbroken on its nodes, or say --command"
        say(f"{ended}, exit code {code}{then}")
    elif job:
        say(f"watch it: unbroken logs {job.id} -f, unbroken status {run} --watch")
    if options.as_json:
        print_json(describe_job(job) if job else {"job": None, "run": run, "exit_code": code})
    return code
