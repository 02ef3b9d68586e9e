"""A job server in memory, with the interface of ray's client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

from orchestrator.jobs.job_server import Cluster, JobRequest

ADDRESS = "http://127.0.0.1:1"


class FakeClient:
    """Jobs run until `end` is called, or `on_follow` ends them when somebody follows their log."""

    def __init__(self) -> None:
        self.records: dict[str, SimpleNamespace] = {}
        self.logs: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.on_follow: Callable[[str], None] = lambda id: self.end(id, "SUCCEEDED", 0)
        self.failures: list[Exception] = []
        """Raised by the next calls, one each."""

    def _answer(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: Any, metadata: Any) -> str:
        self._answer()
        if submission_id in self.records:
            raise RuntimeError(
                "Request failed with status code 500: Traceback (most recent call last):\n  File x\n"
                f"ValueError: Job with submission_id {submission_id} already exists. Please use a different one."
            )
        self.requests.append({"entrypoint": entrypoint, "runtime_env": runtime_env})
        self.add(submission_id, metadata)
        return submission_id

    def add(self, id: str, metadata: dict[str, str] | None, status: str = "RUNNING") -> None:
        self.logs[id] = "one\ntwo\nthree\n"
        self.records[id] = SimpleNamespace(
            submission_id=id,
            metadata=metadata,
            status=status,
            driver_exit_code=None,
            message=None,
            start_time=1_000 * (len(self.records) + 1),
            end_time=None,
        )

    def end(self, id: str, status: str, code: int | None = None, message: str | None = None) -> None:
        record = self.records[id]
        record.status, record.driver_exit_code, record.message, record.end_time = status, code, message, 10**6

    def list_jobs(self) -> list[Any]:
        self._answer()
        return list(self.records.values())

    def stop_job(self, job_id: str) -> bool:
        self._answer()
        self.end(job_id, "STOPPED")
        return True

    def get_job_logs(self, job_id: str) -> str:
        return self.logs[job_id]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        text = self.logs[job_id]
        yield text[:5]
        self._answer()
        self.on_follow(job_id)
        yield text[5:]


def cluster(client: FakeClient, num_nodes: int = 1) -> Cluster:
    return Cluster(ADDRESS, client, lambda: num_nodes)


def request(run_url: str = "s3://b/runs/digits", digest: str = "d1") -> JobRequest:
    return JobRequest(
        run_url=run_url,
        config_digest=digest,
        entrypoint="unbroken train c.yaml",
        package="/tmp/x.zip",
        environment={"RAY_JOB_STOP_WAIT_TIME_S": "60"},
        grace_s=60,
    )
