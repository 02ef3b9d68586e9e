from __future__ import annotations

import socket

import pytest
from ray.exceptions import AuthenticationError

from orchestrator.errors import ClusterError
from orchestrator.jobs import job_server
from orchestrator.jobs.job_server import Cluster
from tests.orchestrator.fake_jobs import ADDRESS, FakeClient, cluster, request
from trainers.errors import ConfigError


def test_a_job_tells_what_it_was_submitted_with():
    client = FakeClient()
    assert cluster(client).submit("digits-a1", request())
    (job,) = cluster(client).jobs()
    assert (job.id, job.run_url, job.config_digest, job.grace_s) == ("digits-a1", "s3://b/runs/digits", "d1", 60)
    assert job.live and job.status == "RUNNING" and job.exit_code is None and job.started_s == 1
    assert client.requests == [
        {
            "entrypoint": "unbroken train c.yaml",
            "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}, "working_dir": "/tmp/x.zip"},
        }
    ]


def test_jobs_of_others_are_passed_over():
    client = FakeClient()
    client.add("theirs", None)
    client.add("theirs-too", {"run_id": "x"})
    assert cluster(client).jobs() == []


def test_a_taken_name_is_no_error():
    client = FakeClient()
    assert cluster(client).submit("digits-a1", request())
    assert not cluster(client).submit("digits-a1", request())


def test_a_signal_is_an_exit_code_and_the_log_is_left_out_of_the_detail():
    client = FakeClient()
    cluster(client).submit("digits-a1", request())
    client.end("digits-a1", "FAILED", -9, "it failed, last available logs (truncated to 20,000 chars):\none\ntwo")
    job = cluster(client).job("digits-a1")
    assert job is not None and (job.exit_code, job.detail, job.live) == (137, "it failed", False)


def test_following_writes_each_line_once_through_a_broken_connection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.jobs.job_server._AGAIN_S", 0.0)
    client = FakeClient()
    cluster(client).submit("digits-a1", request())
    client.failures = [RuntimeError("WebSocket connection closed unexpectedly with close code 1006")]
    written: list[str] = []
    cluster(client).follow("digits-a1", written.append)
    assert "".join(written) == "one\ntwo\nthree\n" and len(written) == 2


def test_a_reader_that_is_gone_is_no_trouble_of_the_cluster():
    client = FakeClient()
    cluster(client).submit("digits-a1", request())

    def write(text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        cluster(client).follow("digits-a1", write)


def test_following_ends_with_a_head_that_forgot_the_job():
    client = FakeClient()
    cluster(client).submit("digits-a1", request())
    client.on_follow = lambda id: client.records.clear()
    cluster(client).follow("digits-a1", lambda text: None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("HTTPConnectionPool(host=...) long"), f"no job server answers at {ADDRESS} (ConnectionError)"),
        (RuntimeError("Request failed with status code 500: Traceback\n File\nValueError: bad env\n"), "bad env"),
        (RuntimeError("Request failed with status code 418: tea"), "refuses: Request failed with status code 418"),
        (
            AuthenticationError("Authentication failed: Invalid\n\nmore"),
            "(Authentication failed: Invalid); set RAY_AUTH_",
        ),
    ],
)
def test_what_goes_wrong_is_one_line(error: Exception, message: str):
    client = FakeClient()
    client.failures = [error]
    with pytest.raises(ClusterError) as caught:
        cluster(client).jobs()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_an_address_that_is_no_dashboard(monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv(variable, "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=f"{variable}=10.0.0.1:6379 is no job server"):
        Cluster.connect(None)
    with pytest.raises(ConfigError, match="--address=auto is no job server"):
        Cluster.connect("auto")


def test_somebody_who_never_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.jobs.job_server._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ClusterError, match=r"no job server answers at .* \(TimeoutError\); give"):
            Cluster.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_head_that_falls_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.jobs.job_server._REQUEST_S", 0.2)
    monkeypatch.setattr(job_server.JobSubmissionClient, "_check_connection_and_version", lambda *_, **__: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(job_server, "_ask", lambda address: None)
        with pytest.raises(ClusterError, match=r"no job server answers at .* \(ReadTimeout\)"):
            Cluster.connect(address).jobs()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(ClusterError, match=rf"no job server answers at {ADDRESS} \(Connection refused\)"):
        Cluster.connect(ADDRESS)
