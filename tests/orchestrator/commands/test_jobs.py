from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.config import load_config, run_url, to_dict
from orchestrator.jobs.job_server import Cluster
from tests.orchestrator.fake_jobs import FakeClient, cluster, request
from tests.orchestrator.tiny_run import CONFIG


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """A cluster of one node, wherever one connects to."""
    client = FakeClient()
    monkeypatch.setattr(Cluster, "connect", staticmethod(lambda address: cluster(client)))
    monkeypatch.setattr("orchestrator.jobs.job_server._AGAIN_S", 0.0)
    monkeypatch.setattr("orchestrator.jobs.submission._MOST_PAUSE_S", 0.0)
    return client


def test_submit_follows_and_ends_like_the_job(folder: Path, client: FakeClient):
    result = unbroken("submit", "tiny.yaml", "seed=7")
    assert result.exit_code == 0, result.output
    assert f"the run is in {folder}/runs/tiny, on the cluster's machine" in result.stdout
    assert "tiny-a1: submitted\none\ntwo\nthree\ntiny-a1: SUCCEEDED, exit code 0\n" in result.stdout
    (sent,) = client.requests
    assert sent["entrypoint"] == f"unbroken train tiny.yaml seed=7 'storage=\"{folder}/runs\"'"
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "40"}
    client.on_follow = lambda id: client.end(id, "FAILED", 4)
    again = unbroken("submit", "tiny.yaml", "seed=7")
    assert again.exit_code == 4 and "tiny-a2: FAILED, exit code 4\n" in again.stdout
    client.on_follow = lambda id: client.end(id, "FAILED", 137)
    lost = unbroken("submit", "tiny.yaml", "seed=7")
    assert lost.exit_code == 137 and "the same command goes on, with --supervise by itself" in lost.stdout


def test_what_is_submitted_can_be_read_there(folder: Path, client: FakeClient, monkeypatch: pytest.MonkeyPatch):
    """The entry point's own arguments, in the packed folder, give the config that was checked here."""
    kept: list[list[str]] = []
    submit_job = client.submit_job

    def unpack(**sent):
        with zipfile.ZipFile(sent["runtime_env"]["working_dir"]) as archive:
            kept.append(archive.namelist())
            archive.extractall(folder / "there")
        return submit_job(**sent)

    monkeypatch.setattr(client, "submit_job", unpack)
    options = ("--env", "OMP_NUM_THREADS=1", "--command", "python -m orchestrator", "--no-follow")
    overrides = ("storage=s3://bucket/a b", "run.grace_s=15.5", "workers={min: 1, max: 2}")
    assert unbroken("submit", "tiny.yaml", *overrides, *options).exit_code == 0
    assert kept == [["tiny.yaml"]]
    (sent,) = client.requests
    assert sent["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": "31"}
    python, dash_m, module, train, config, *overrides = shlex.split(sent["entrypoint"])
    assert (python, dash_m, module, train) == ("python", "-m", "orchestrator", "train")
    loaded = load_config(folder / "there" / config, overrides)
    assert loaded.storage == "s3://bucket/a b" and loaded.max_workers == 2


def test_json_is_alone_on_stdout(folder: Path, client: FakeClient):
    result = unbroken("submit", "tiny.yaml", "--json")
    found = json.loads(result.stdout)
    assert (found["job"], found["status"], found["exit_code"]) == ("tiny-a1", "SUCCEEDED", 0)
    assert found["run"] == f"{folder}/runs/tiny" and "three" in result.stderr
    listed = json.loads(unbroken("jobs", "list", "--json").stdout)
    assert [row["job"] for row in listed] == ["tiny-a1"] and listed[0]["started"] == "1970-01-01T00:00:01+00:00"


def test_a_job_that_lives_is_attached_to(folder: Path, client: FakeClient):
    unbroken("submit", "tiny.yaml", "--no-follow")
    result = unbroken("submit", "tiny.yaml")
    assert "tiny-a1: runs already; attached, nothing was submitted" in result.stdout and len(client.requests) == 1


def test_a_cluster_without_unbroken(folder: Path, client: FakeClient):
    client.on_follow = lambda id: client.end(id, "FAILED", 127)
    result = unbroken("submit", "tiny.yaml", "--supervise")
    assert result.exit_code == 127 and "cannot start `unbroken`: install unbroken on its nodes" in result.stdout


def test_ctrl_c_leaves_the_job(folder: Path, client: FakeClient):
    def interrupt(id: str) -> None:
        raise KeyboardInterrupt

    client.on_follow = interrupt
    result = unbroken("submit", "tiny.yaml")
    assert result.exit_code == 130 and "the job goes on: unbroken logs tiny -f" in result.stdout
    assert client.records["tiny-a1"].status == "RUNNING"


def test_several_nodes_want_shared_storage(folder: Path, client: FakeClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Cluster, "connect", staticmethod(lambda address: cluster(client, num_nodes=3)))
    refused = unbroken("submit", "tiny.yaml")
    assert refused.exit_code == 2 and "storage=runs is a folder of one machine, and the cluster has 3" in refused.stderr
    assert client.requests == []
    warned = unbroken("submit", "tiny.yaml", "storage=/mnt/runs")
    assert (
        warned.exit_code == 0 and "warning: /mnt/runs must be one file system that all 3 nodes mount" in warned.stdout
    )


def test_supervise(folder: Path, client: FakeClient):
    endings = [("FAILED", 137), ("SUCCEEDED", 0)]
    client.on_follow = lambda id: client.end(id, *endings.pop(0))
    result = unbroken("submit", "tiny.yaml", "--supervise")
    assert result.exit_code == 0 and "tiny-a1 lost its driver (exit code 137)" in result.stdout
    assert "tiny-a2: SUCCEEDED, exit code 0" in result.stdout


def test_resume_takes_the_config_of_the_run(folder: Path, client: FakeClient):
    config = load_config("tiny.yaml", ["seed=9", "run.name=other"])
    open_or_create(Store.open(str(folder / "kept" / "tale")), to_dict(config))
    result = unbroken("resume", "kept/tale", "workers=2", "--no-follow", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["run"] == f"{folder}/kept/tale"
    assert (
        f"train config.yaml workers=2 'run.name=\"tale\"' 'storage=\"{folder}/kept\"'"
        in client.requests[0]["entrypoint"]
    )
    taken: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.commands.submit.train_here", taken.append)
        assert unbroken("resume", "kept/tale", "--here").exit_code == 0
    assert taken[0].seed == 9 and taken[0].run.name == "tale" and taken[0].storage == f"{folder}/kept"


@pytest.mark.parametrize(("tier", "kept"), [("kept", "kept"), ("kept/", "kept"), ("moved", "\U0001f600")])
def test_resume_finds_a_run_with_tiers_where_it_is(folder: Path, tier: str, kept: str, monkeypatch: pytest.MonkeyPatch):
    tiers = f"checkpoint.tiers=[{{url: peer://, every: 5, keep: 2}}, {{url: {tier}, every: 10, keep: 9}}]"
    config = load_config("tiny.yaml", [tiers])
    open_or_create(Store.open(str(folder / kept / "tale")), to_dict(config))
    taken: list = []
    monkeypatch.setattr("orchestrator.commands.submit.train_here", taken.append)
    result = unbroken("resume", f"{kept}/tale", "--here")
    assert result.exit_code == 0, result.output
    assert run_url(taken[0]) == f"{folder}/{kept}/tale" and len(taken[0].checkpoint.tiers) == 2


def test_logs_and_stop(client: FakeClient):
    cluster(client).submit("digits-a1", request())
    assert unbroken("logs", "digits").stdout == "one\ntwo\nthree\n"
    result = unbroken("stop", "s3://b/runs/digits")
    assert result.exit_code == 0 and result.stdout == "digits-a1: STOPPED\n"
    assert "it is killed if it has not saved and ended in 60 s" in result.stderr
    assert "has ended already" in unbroken("stop", "digits").stderr
    assert "digits-a1  STOPPED  -     1970-01-01T00:00:01+00:00" in unbroken("jobs", "list").stdout
    assert unbroken("logs", "digits", "-f").stdout == "one\ntwo\nthree\n"


def test_a_job_that_does_not_stop(client: FakeClient, monkeypatch: pytest.MonkeyPatch):
    cluster(client).submit("digits-a1", request())
    monkeypatch.setattr(client, "stop_job", lambda id: True)
    monkeypatch.setattr("orchestrator.commands.jobs._STOP_MARGIN_S", -60.0)
    assert unbroken("stop", "digits").exit_code == 3
    assert unbroken("stop", "digits", "--no-wait").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["submit"], "Missing argument 'CONFIG'"),
        (["submit", "none.yaml"], "none.yaml: No such file"),
        (["submit", "tiny.yaml", "train.num_step=3"], "did you mean train.num_steps?"),
        (["submit", "tiny.yaml", "model.args.out_channels=3"], "cannot take images"),
        (["submit", "tiny.yaml", "--supervise", "--no-follow"], "--supervise has to follow the job"),
        (["submit", "tiny.yaml", "--env", "A"], "--env takes NAME=VALUE"),
        (["submit", "tiny.yaml", "--env", "WANDB_API_KEY=hunter2"], "--env: WANDB_API_KEY holds what looks like"),
        (["submit", "tiny.yaml", "storage=s3://me:hunter2@b"], "an override: storage holds what looks like"),
        (["submit", "tiny.yaml", "HF_TOKEN=hunter2"], "an override: HF_TOKEN holds"),
        (["train", "tiny.yaml", "AWS_SECRET_ACCESS_KEY=hunter2"], "an override: AWS_SECRET_ACCESS_KEY holds"),
        (["train", "secret.yaml"], "secret.yaml: tracking.api_key holds what looks like a secret"),
        (["submit", "tiny.yaml", "--working-dir", "none"], "--working-dir none is no folder"),
        (["submit", "tiny.yaml", "run.grace_s=0"], "run.grace_s=0 must be above 0"),
        (["resume", "runs/none"], "no run at"),
        (["resume", "tiny.yaml"], "no run at"),
        (["resume", "runs/none", "storage=x"], "storage=x contradicts RUN"),
        (["runs", "list", "tiny.yaml"], "tiny.yaml is a file; give the folder"),
        (["logs", "none"], "no job of none on this cluster; it has jobs of: none"),
        (["stop", "none"], "no job of none"),
        (["jobs", "lst"], "No such command 'lst'"),
        (["runs", "list", "nope://x"], "cannot be opened"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    folder: Path, client: FakeClient, args: list[str], message: str
):
    Path("secret.yaml").write_text(yaml.safe_dump(CONFIG | {"tracking": {"api_key": "hunter2"}}))
    result = unbroken(*args)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and "hunter2" not in result.output
    assert client.requests == []


def test_no_cluster_is_one_line(folder: Path):
    result = unbroken("submit", "tiny.yaml", "--address", "http://127.0.0.1:1")
    assert result.exit_code == 3 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: no job server answers at http://127.0.0.1:1 ")
