"""The door to Ray's job server: what is submitted there, how it is doing, and what it wrote."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, get_excludes_from_ignore_files
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes

from orchestrator.cluster.joining import GIVE_TOKEN
from orchestrator.errors import ClusterError
from trainers.errors import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
MAX_PACKAGE_BYTES = GCS_STORAGE_MAX_SIZE
"""Of a working directory; a limit of Ray's."""
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_MAX_NODES = 10_000
_SILENCE_S = 15.0
"""Seconds without a line of the log after which we ask whether the job still lives."""
_AGAIN_S = 1.0
_ANSWER_S = 10.0
_REQUEST_S = 120.0
"""Silence that a request may meet; a head that is busy may take long to keep a large working directory."""
_RUN, _CONFIG, _GRACE = "unbroken_run", "unbroken_config", "unbroken_grace_s"


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A job to be submitted."""

    run_url: str
    config_digest: str
    """Equal for equal configs, with what decides no number."""
    entrypoint: str
    """A line of shell."""
    package: str | None
    """Path of a zip file, or a URI: the working directory of the job. None: it has none."""
    environment: Mapping[str, str]
    grace_s: int
    """Seconds from SIGTERM to SIGKILL when it is stopped."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of ours that the cluster knows."""

    id: str
    run_url: str
    config_digest: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    exit_code: int | None
    """Of the driver, if it ended by itself."""
    detail: str
    """One line of Ray's own words."""
    grace_s: int
    started_s: float | None
    """Unix time."""
    ended_s: float | None

    @property
    def live(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


class Client(Protocol):
    """What we use of `JobSubmissionClient`."""

    def submit_job(self, **request: Any) -> str: ...
    def list_jobs(self) -> Sequence[Any]: ...
    def stop_job(self, job_id: str) -> bool: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> Any: ...


class _PunctualClient(JobSubmissionClient):
    """Ray's own, which would wait without end for a head that takes a request and says nothing."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_REQUEST_S, **options)


class Cluster:
    """The jobs of one Ray cluster."""

    def __init__(self, address: str, client: Client, count_nodes: Callable[[], int]) -> None:
        self.address = address
        self._client = client
        self._count_nodes = count_nodes

    @staticmethod
    def connect(address: str | None) -> Cluster:
        """The cluster at `address`, else at the one of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else on this machine.

        Raises:
            ConfigError: this is no address of a job server.
            ClusterError: nobody answers there.
        """
        name, address = next(
            (pair for pair in (("--address", address), *((key, os.environ.get(key)) for key in _VARIABLES)) if pair[1]),
            ("--address", DEFAULT_ADDRESS),
        )
        assert address is not None
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"{name}={address} is no job server; give its dashboard: --address http://HOST:8265")
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        with _translated(address), _preferred(address):
            _ask(address)  # Ray itself would wait for minutes where nothing answers
            client: Any = _PunctualClient(address)
        return Cluster(address, client, lambda: _num_nodes(address))

    def num_nodes(self) -> int:
        with _translated(self.address):
            return self._count_nodes()

    def jobs(self) -> list[Job]:
        """All that `submit` put there, the oldest first."""
        with _translated(self.address):
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.submission_id and _RUN in (details.metadata or {})]
        return sorted(jobs, key=lambda job: job.started_s or 0.0)

    def job(self, id: str) -> Job | None:
        """None: the cluster does not know it, for example because its head is another one by now."""
        return next((job for job in self.jobs() if job.id == id), None)

    def submit(self, id: str, request: JobRequest) -> bool:
        """Whether it was submitted; False: the cluster has a job `id` already."""
        runtime_env: dict[str, Any] = {"env_vars": dict(request.environment)}
        if request.package is not None:
            runtime_env["working_dir"] = request.package
        try:
            with _translated(self.address):
                self._client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=id,
                    runtime_env=runtime_env,
                    metadata={
                        _RUN: request.run_url,
                        _CONFIG: request.config_digest,
                        _GRACE: str(request.grace_s),
                    },
                )
        except ClusterError as error:
            if "already exists" in str(error):
                return False
            raise
        return True

    def stop(self, id: str) -> None:
        """Ask for it: the driver gets SIGTERM now, and SIGKILL when its grace time is over."""
        with _translated(self.address):
            self._client.stop_job(id)

    def logs(self, id: str) -> str:
        with _translated(self.address):
            return self._client.get_job_logs(id)

    def follow(self, id: str, write: Callable[[str], None]) -> None:
        """Write what the job writes, from its beginning, until it has ended or the cluster does not know it any more.

        Raises:
            ClusterError: the cluster does not answer.
        """
        log = _Log(write)
        while True:
            before, failed = log.written, False
            try:
                asyncio.run(self._tail(id, log))
            except ClusterError:
                failed = True
            job = self.job(id)
            if job is None or not (job.live or (failed and log.written > before)):
                return
            time.sleep(_AGAIN_S)

    async def _tail(self, id: str, log: _Log) -> None:
        log.from_the_beginning()
        with _translated(self.address):
            chunks = self._client.tail_job_logs(id)
        # Outside of what is translated: that nobody reads what is written says nothing of the cluster.
        while (text := await self._next(id, chunks)) is not None:
            log.write(text)

    async def _next(self, id: str, chunks: AsyncIterator[str]) -> str | None:
        """What the job wrote next; None: that was all, or the cluster does not know the job any more."""
        with _translated(self.address):
            chunk = asyncio.ensure_future(anext(chunks, None))
            while not (await asyncio.wait({chunk}, timeout=_SILENCE_S))[0]:
                # A head that is cut off does not say that the log has ended.
                if await asyncio.to_thread(self.job, id) is None:
                    chunk.cancel()
                    return None
            return chunk.result()


class _Log:
    """A log that is read from its beginning at every connection, and written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._read = 0
        self.written = 0

    def from_the_beginning(self) -> None:
        self._read = 0

    def write(self, text: str) -> None:
        new = text[max(0, self.written - self._read) :]
        self._read += len(text)
        if new:
            self._write(new)
            self.written = self._read


def ignore_rules(folder: Path) -> list[Callable[[Path], bool]]:
    """What the .gitignore and .rayignore of `folder` leave out, as Ray reads them."""
    silent = logging.getLogger("orchestrator.ignore_rules")
    silent.setLevel(logging.ERROR)
    return get_excludes_from_ignore_files(folder, include_gitignore=True, logger=silent)


def _ask(address: str) -> None:
    """Return when it has answered anything. Raises OSError: it does not."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_ANSWER_S).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer too
    except urllib.error.URLError as error:
        raise (error.reason if isinstance(error.reason, OSError) else error) from None


def _num_nodes(address: str) -> int:
    with _preferred(address):
        return len(list_nodes(address=address, filters=[("state", "=", "ALIVE")], limit=_MAX_NODES))


@contextmanager
def _preferred(address: str) -> Iterator[None]:
    """Ray takes its variables before an address that it is given: have them say the same."""
    name, before = _VARIABLES[0], os.environ.get(_VARIABLES[0])
    os.environ[name] = address
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def _job(details: Any) -> Job:
    metadata = details.metadata
    code = details.driver_exit_code
    return Job(
        id=details.submission_id,
        run_url=metadata[_RUN],
        config_digest=metadata.get(_CONFIG, ""),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=128 - code if code is not None and code < 0 else code,  # -9: ended by signal 9
        detail=(details.message or "").partition("\n")[0].partition(", last available logs")[0],
        grace_s=int(metadata.get(_GRACE, 0)),
        started_s=None if details.start_time is None else details.start_time / 1000,
        ended_s=None if details.end_time is None else details.end_time / 1000,
    )


@contextmanager
def _translated(address: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, ClusterError):
        raise
    except AuthenticationError as error:
        reason = error.message.splitlines()[0].partition(". ")[0]
        raise ClusterError(
            f"the job server at {address} asks for the token of its cluster ({reason}); {GIVE_TOKEN}"
        ) from error
    except OSError as error:  # as are those of requests; aiohttp's for a connection too
        reason = error.strerror or type(error).__name__
        raise ClusterError(
            f"no job server answers at {address} ({reason}); give the address of the cluster's dashboard:"
            " --address http://HOST:8265. On Kubernetes: kubectl port-forward service/<cluster>-head-svc 8265"
        ) from error
    except Exception as error:  # Ray raises RuntimeError for all that its server refuses, with the server's own trace
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        line = lines[-1] if "Traceback" in str(error) else lines[0]
        raise ClusterError(f"the job server at {address} refuses: {line.strip()}") from error
