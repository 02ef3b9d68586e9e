"""A run as jobs of a cluster: one at a time, the next one when the driver of the last is lost."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from orchestrator.errors import HOPELESS_CODES, ClusterError, GaveUpError, RunNotFoundError
from orchestrator.jobs.job_server import Cluster, Job, JobRequest
from trainers.errors import ConfigError

STOPPED_CODE = 143
LOST_CODE = 3
NOT_THERE_CODES = (126, 127)
"""What a shell ends with if it finds no command, or one that it cannot start."""
_FINAL_CODES = (*HOPELESS_CODES, *NOT_THERE_CODES)
"""Of drivers that must not be started again."""
_SHORT_S = 60.0
_MOST_SHORT_LIVES = 5
"""Jobs in a row that may end within a minute of their start; what lives longer is the business of the driver."""
_MOST_PAUSE_S = 60.0


def submit_or_attach(cluster: Cluster, request: JobRequest) -> tuple[Job, bool]:
    """The job of this run: the one that lives, or a new one under the next free name.

    Returns:
        The job, and whether it was submitted now.

    Raises:
        ConfigError: one lives, with another config.
        ClusterError: the cluster does not answer, or has forgotten the job at once.
    """
    taken: list[str] = []
    while True:
        jobs = cluster.jobs()
        if live := [job for job in jobs if job.run_url == request.run_url and job.live]:
            job = live[-1]
            if job.config_digest != request.config_digest:
                raise ConfigError(
                    f"{job.id} runs {request.run_url} with another config or other overrides; give the same ones to"
                    f" attach to it, or first: unbroken stop {request.run_url}"
                )
            return job, False
        id = _next_id(request.run_url, [*(job.id for job in jobs), *taken])
        if cluster.submit(id, request):
            return _submitted(cluster, id), True
        taken.append(id)  # a moment ago: if by a job of this run, the next look finds it


def supervise(
    cluster: Cluster,
    request: JobRequest,
    write: Callable[[str], None],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Job:
    """Have a job of this run alive until it needs no other; the last one.

    Raises:
        GaveUpError: jobs end at once, again and again.
    """
    away, short_lives = 0, 0
    while True:
        try:
            job, new = submit_or_attach(cluster, request)
            away = 0
            say(f"{job.id}: {'submitted' if new else 'runs already, attached'}")
            began_s = time.monotonic()
            cluster.follow(job.id, write)
            ended = cluster.job(job.id)
        except ClusterError as error:
            if not away:
                say(f"{error}; trying again until it answers")
            away += 1
            sleep(min(_MOST_PAUSE_S, 2.0 ** min(away, 10)))  # 2.0**1024 is an error, after 17 hours
            continue
        if ended is not None and not needs_another(ended):
            return ended
        reason = f"exit code {exit_code(ended)}" if ended else "the cluster has forgotten it: its head is a new one"
        short_lives = short_lives + 1 if time.monotonic() - began_s < _SHORT_S else 0
        if short_lives >= _MOST_SHORT_LIVES:
            raise GaveUpError(f"{short_lives} jobs in a row ended at once, the last one ({job.id}) with {reason}")
        say(f"{job.id} lost its driver ({reason}); submitting the next one")
        sleep(min(_MOST_PAUSE_S, 2.0**short_lives))


def needs_another(job: Job) -> bool:
    """Whether the run of an ended job should go on in another one."""
    return job.status == "FAILED" and exit_code(job) not in _FINAL_CODES


def exit_code(job: Job | None) -> int:
    """What `unbroken train` ended with in that job; 3 if its driver was lost, 143 if it was stopped."""
    if job is None:
        return LOST_CODE
    if job.status == "STOPPED":
        return STOPPED_CODE
    if job.status == "SUCCEEDED":
        return 0
    return LOST_CODE if job.exit_code is None else job.exit_code


def job_of(jobs: list[Job], run: str) -> Job:
    """The newest job of a run, the live one first.

    Args:
        jobs: oldest first.
        run: URL of a run, name of a run, or id of a job.

    Raises:
        RunNotFoundError: there is none, or several runs have this name.
    """
    found = [job for job in jobs if run in (job.id, job.run_url, job.run_url.rpartition("/")[2])]
    if not found:
        known = ", ".join(sorted({job.run_url for job in jobs})) or "none"
        raise RunNotFoundError(f"no job of {run} on this cluster; it has jobs of: {known}")
    if len(urls := {job.run_url for job in found}) > 1:
        raise RunNotFoundError(f"{run} is the name of several runs: {', '.join(sorted(urls))}; give one of these")
    return max(found, key=lambda job: (job.live, job.started_s or 0.0))


def _next_id(url: str, ids: list[str]) -> str:
    name = url.rpartition("/")[2]
    numbers = [int(match[1]) for id in ids if (match := re.fullmatch(rf"{re.escape(name)}-a(\d+)", id))]
    return f"{name}-a{max(numbers, default=0) + 1}"


def _submitted(cluster: Cluster, id: str) -> Job:
    job = cluster.job(id)
    if job is None:  # its head has just become another one, which knows of nothing
        raise ClusterError(f"{id} was submitted, and the cluster does not list it; see `ray job list`")
    return job
