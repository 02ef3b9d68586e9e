"""`unbroken logs | stop | jobs list`: the jobs of a Ray cluster."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands.json_output import JSON, print_json

if TYPE_CHECKING:
    from orchestrator.jobs.job_server import Cluster, Job

ADDRESS = click.option(
    "--address",
    metavar="http://HOST:8265",
    help="The cluster's dashboard. Default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, or this machine.",
)
_STOP_POLL_S = 0.5
_STOP_MARGIN_S = 10.0


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends. Ctrl-C leaves it running.")
@ADDRESS
def logs(run: str, follow: bool, address: str | None) -> None:
    """Show what the job of a run writes, from its beginning.

    RUN is the URL of the run, its name, or the id of a job (digits-a2). If it has had several jobs: the last one.

    \b
      unbroken logs digits -f
      unbroken logs s3://bucket/runs/digits --address http://head:8265
    """
    cluster, job = _find(run, address)
    if follow:
        cluster.follow(job.id, lambda text: click.echo(text, nl=False))
    else:
        click.echo(cluster.logs(job.id), nl=False)


@click.command()
@click.argument("run")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Stay until the job has ended.")
@ADDRESS
@JSON
def stop(run: str, wait: bool, address: str | None, as_json: bool) -> int:
    """Stop the job of a run, with time for a last checkpoint.

    `submit` or `resume` goes on with the run later. The driver gets SIGTERM, saves the step under way and ends. It has
    the run.grace_s of its config for that, and Ray kills it 15 s later; Ray fixes this time at submission, so it cannot
    be changed here. Should it not suffice, the run goes on from the checkpoint before.

    RUN is the URL of the run, its name, or the id of a job. Exit code 3 if the job has not ended when its grace time is
    over.
    """
    cluster, job = _find(run, address)
    if job.live:
        cluster.stop(job.id)
        click.echo(f"{job.id}: asked to stop; it is killed if it has not saved and ended in {job.grace_s} s", err=True)
        deadline_s = time.monotonic() + job.grace_s + _STOP_MARGIN_S
        while wait and job.live and time.monotonic() < deadline_s:
            time.sleep(_STOP_POLL_S)
            job = cluster.job(job.id) or job
    else:
        click.echo(f"{job.id}: has ended already", err=True)
    if as_json:
        print_json(describe_job(job))
    else:
        click.echo(f"{job.id}: {job.status}")
    return 3 if wait and job.live else 0


@click.group()
def jobs() -> None:
    """Look at the jobs of a cluster."""


@jobs.command("list")
@ADDRESS
@JSON
def list_(address: str | None, as_json: bool) -> None:
    """List the jobs that `submit` and `resume` made on a cluster, newest first.

    STATUS is Ray's own: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED. EXIT is that of the driver; a job that FAILED
    without one lost its driver. Where a run stands: `unbroken status RUN`.
    """
    from orchestrator.jobs.job_server import Cluster

    rows = [describe_job(job) for job in reversed(Cluster.connect(address).jobs())]
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no job of unbroken")
    columns = ("job", "status", "exit_code", "started", "ended", "run")
    table = [("JOB", "STATUS", "EXIT", "STARTED", "ENDED", "RUN")] if rows else []
    table += [tuple("-" if row[name] is None else str(row[name]) for name in columns) for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))] if table else []
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _find(run: str, address: str | None) -> tuple[Cluster, Job]:
    from orchestrator.checkpoint.store import Store
    from orchestrator.jobs.job_server import Cluster
    from orchestrator.jobs.submission import job_of

    cluster = Cluster.connect(address)
    return cluster, job_of(cluster.jobs(), Store.open(run).url if "/" in run else run)


def describe_job(job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "run": job.run_url,
        "status": job.status,
        "exit_code": job.exit_code,
        "detail": job.detail,
        "grace_s": job.grace_s,
        "started": _utc(job.started_s),
        "ended": _utc(job.ended_s),
    }


def _utc(time_s: float | None) -> str | None:
    return None if time_s is None else datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds")
