from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import ClusterError, GaveUpError, RunNotFoundError
from orchestrator.jobs.submission import exit_code, job_of, submit_or_attach, supervise
from tests.orchestrator.fake_jobs import FakeClient, cluster, request
from trainers.errors import ConfigError


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.jobs.job_server._AGAIN_S", 0.0)


def test_the_next_free_name():
    client = FakeClient()
    job, new = submit_or_attach(cluster(client), request())
    assert (job.id, new) == ("digits-a1", True)
    client.end("digits-a1", "FAILED", 1)
    assert submit_or_attach(cluster(client), request())[0].id == "digits-a2"


def test_a_live_job_is_attached_to_and_another_config_refused():
    client = FakeClient()
    submit_or_attach(cluster(client), request())
    job, new = submit_or_attach(cluster(client), request())
    assert (job.id, new, len(client.requests)) == ("digits-a1", False, 1)
    with pytest.raises(ConfigError, match="digits-a1 runs s3://b/runs/digits with another config"):
        submit_or_attach(cluster(client), request(digest="d2"))


def test_two_runs_of_one_name_do_not_mix():
    client = FakeClient()
    submit_or_attach(cluster(client), request())
    assert submit_or_attach(cluster(client), request("s3://other/digits"))[0].id == "digits-a2"
    with pytest.raises(RunNotFoundError, match="several runs: s3://b/runs/digits, s3://other/digits"):
        job_of(cluster(client).jobs(), "digits")
    assert job_of(cluster(client).jobs(), "s3://b/runs/digits").id == "digits-a1"


def test_a_name_that_others_took_is_skipped():
    client = FakeClient()
    client.add("digits-a1", None)
    assert submit_or_attach(cluster(client), request())[0].id == "digits-a2"


def test_who_loses_the_race_attaches_to_the_winner():
    client = FakeClient()

    class Late(FakeClient):
        """Sees no job in its first look; by then the other one has submitted."""

        def __init__(self) -> None:
            super().__init__()
            self.looks = 0

        def list_jobs(self) -> list:
            self.looks += 1
            return client.list_jobs() if self.looks > 1 else []

    late = Late()
    late.records, late.logs = client.records, client.logs
    submit_or_attach(cluster(client), request())
    job, new = submit_or_attach(cluster(late), request())
    assert (job.id, new) == ("digits-a1", False) and late.requests == []


def supervised(client: FakeClient, *endings: tuple[str, int | None]) -> tuple[object, list[str], list[float]]:
    """The last job when the jobs end like that, one after the other; what was said; how long it waited."""
    left = list(endings)
    client.on_follow = lambda id: client.end(id, *left.pop(0))
    said: list[str] = []
    pauses: list[float] = []
    job = supervise(cluster(client), request(), lambda text: None, said.append, pauses.append)
    assert left == []
    return job, said, pauses


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 4, 4),
        ("FAILED", 6, 6),
        ("FAILED", 127, 127),
        ("STOPPED", None, 143),
    ],
)
def test_what_ends_a_supervised_run(status: str, code: int | None, told: int):
    client = FakeClient()
    job, _, _ = supervised(client, (status, code))
    assert exit_code(job) == told and len(client.requests) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [1, 3, 5, 137, 143, None])
def test_a_lost_driver_is_replaced(code: int | None):
    client = FakeClient()
    _, said, _ = supervised(client, ("FAILED", code), ("SUCCEEDED", 0))
    assert list(client.records) == ["digits-a1", "digits-a2"]
    assert f"digits-a1 lost its driver (exit code {3 if code is None else code})" in said[1]


def test_a_head_that_is_away_is_waited_for_and_a_new_one_gets_the_job():
    client = FakeClient()
    left = ["forget", "end"]

    def on_follow(id: str) -> None:
        if left.pop(0) == "forget":
            client.records.clear()
            client.failures = [ConnectionError(), ConnectionError(), ConnectionError()]
        else:
            client.end(id, "SUCCEEDED", 0)

    client.on_follow = on_follow
    said: list[str] = []
    job = supervise(cluster(client), request(), lambda text: None, said.append, lambda seconds: None)
    assert job.status == "SUCCEEDED" and len(client.requests) == 2
    assert len([line for line in said if "trying again until it answers" in line]) == 1


def test_a_head_that_is_lost_right_after_the_submission_gets_the_job_again():
    class Forgetful(FakeClient):
        def submit_job(self, **job: Any) -> str:
            id = super().submit_job(**job)
            if len(self.requests) == 1:
                self.records.clear()
            return id

    client = Forgetful()
    said: list[str] = []
    job = supervise(cluster(client), request(), lambda text: None, said.append, lambda seconds: None)
    assert job.status == "SUCCEEDED" and len(client.requests) == 2
    assert "does not list it" in said[0]


def test_jobs_that_end_at_once_are_not_submitted_for_ever():
    client = FakeClient()
    with pytest.raises(GaveUpError, match="5 jobs in a row ended at once"):
        supervised(client, *[("FAILED", 1)] * 5)
    assert len(client.requests) == 5


def test_pauses_grow():
    _, _, pauses = supervised(FakeClient(), *[("FAILED", 1)] * 3, ("SUCCEEDED", 0))
    assert pauses == [2, 4, 8]


def test_a_head_may_be_away_for_days():
    client = FakeClient()
    client.on_follow = lambda id: client.end(id, "SUCCEEDED", 0)
    client.failures = [ConnectionError()] * 3000
    pauses: list[float] = []
    job = supervise(cluster(client), request(), lambda text: None, lambda text: None, pauses.append)
    assert job.status == "SUCCEEDED" and pauses[:3] == [2, 4, 8] and set(pauses[5:]) == {60} and len(pauses) == 3000


def test_without_supervision_a_head_that_is_away_is_an_error():
    client = FakeClient()
    client.failures = [ConnectionError()]
    with pytest.raises(ClusterError):
        submit_or_attach(cluster(client), request())


def test_the_live_job_of_a_run_comes_first():
    client = FakeClient()
    for status in ("FAILED", "RUNNING"):
        submit_or_attach(cluster(client), request())
        if status != "RUNNING":
            client.end("digits-a1", status, 1)
    for name in ("digits", "s3://b/runs/digits", "digits-a2"):
        assert job_of(cluster(client).jobs(), name).id == "digits-a2"
    assert job_of(cluster(client).jobs(), "digits-a1").id == "digits-a1"
    with pytest.raises(RunNotFoundError, match="no job of nope on this cluster; it has jobs of: s3://b/runs/digits"):
        job_of(cluster(client).jobs(), "nope")
