"""The scripts in `deploy/` are run, beside programs that stand for those of a cluster."""

from __future__ import annotations

import http.server
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from orchestrator.cli import main as unbroken_cli
from orchestrator.deploy.render import FILES


class Machine:
    """A PATH with stand-ins, all of which write what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls.touch()
        self.put("ray", 'echo "ray $*" >> "$CALLS"; if [[ " $* " == *" --block "* ]]; then exec sleep 300; fi')
        self.put("srun", 'echo "srun $*" >> "$CALLS"; while [[ $1 == --* ]]; do shift; done; exec "$@"')
        self.put("scontrol", 'echo "scontrol $*" >> "$CALLS"; if [[ $1 == show ]]; then printf "localhost\\nb\\n"; fi')

    def put(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.bin / name).chmod(0o755)

    def start(self, script: str | Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=self.folder,
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def called(self, start: str) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if line.startswith(start)]

    def wait_for(self, start: str) -> None:
        deadline = time.monotonic() + 30
        while not self.called(start):
            assert time.monotonic() < deadline, self.calls.read_text()
            time.sleep(0.02)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "[a-b]", "RAY_AUTH_MODE": "disabled"}
UNTIL_TERMINATED = """\
trap 'kill $!; exit 143' TERM
sleep 300 &
echo "unbroken $*" >> "$CALLS"
wait
"""
BOTH_NODES = 'until (($(grep -c "^ray start" "$CALLS") == 2)); do sleep 0.02; done'


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, True),
        (2, 0, False),
        (3, 0, True),
        (4, 0, False),
        (5, 99, True),
        (5, 100, False),
        (6, 0, False),
        (137, 0, True),
        (143, 0, False),  # terminated, but not because of the time limit: it is for Slurm to requeue
    ],
)
def test_slurm_queues_again_what_a_retry_can_help(machine: Machine, code: int, restarts: int, again: bool):
    machine.put("unbroken", f'{BOTH_NODES}; echo "unbroken $* RAY_ADDRESS=$RAY_ADDRESS" >> "$CALLS"; exit {code}')
    job = machine.start(FILES / "slurm/train.sbatch", SLURM_RESTART_COUNT=str(restarts), **SLURM)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == code, output
    assert machine.called("scontrol requeue") == (["scontrol requeue 7"] if again else [])
    assert machine.called("unbroken") == ["unbroken train config.yaml RAY_ADDRESS=127.0.0.1:20007"]
    assert sum("--head" in line for line in machine.called("ray start")) == 1
    assert sum("--address=127.0.0.1:20007" in line for line in machine.called("ray start")) == 1


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_ends_the_driver_first(machine: Machine, number: signal.Signals, again: bool):
    """USR1 is the time limit. TERM is a preemption, after which Slurm requeues by itself, or a scancel."""
    machine.put("unbroken", UNTIL_TERMINATED)
    job = machine.start(FILES / "slurm/train.sbatch", **SLURM)
    machine.wait_for("unbroken")
    job.send_signal(number)
    job.communicate(timeout=60)
    assert job.returncode == 143
    assert bool(machine.called("scontrol requeue")) == again


def test_slurm_makes_a_token_and_hands_it_on(machine: Machine):
    machine.put("unbroken", 'echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE" >> "$CALLS"')
    environment = {**SLURM, "RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}
    machine.start(FILES / "slurm/train.sbatch", **environment).communicate(timeout=60)
    assert machine.called("token") == ["token 64 token"]


def test_slurm_says_that_there_is_no_head(machine: Machine):
    machine.put("ray", "exit 1")
    job = machine.start(FILES / "slurm/train.sbatch", **SLURM)
    assert "no Ray head on localhost" in job.communicate(timeout=60)[0]
    assert job.returncode == 1


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 143])
def test_a_job_that_a_retry_cannot_help_stops_itself(machine: Machine, code: int):
    machine.put("unbroken", f'echo "unbroken $*" >> "$CALLS"; exit {code}')
    machine.put("ray", 'echo "ray $*" >> "$CALLS"')
    machine.put("sleep", 'echo "sleep $*" >> "$CALLS"')
    metadata = '{"metadata": {"job_submission_id": "digits-x"}}'
    job = machine.start(FILES / "unbroken-job", "c.yaml", "seed=1", RAY_JOB_CONFIG_JSON_ENV_VAR=metadata)
    job.communicate(timeout=30)
    assert job.returncode == code
    assert machine.called("unbroken") == ["unbroken train c.yaml seed=1"]
    assert machine.called("ray") == (["ray job stop --no-wait digits-x"] if code in (2, 4, 6) else [])


def test_a_stopped_job_waits_for_its_training(machine: Machine):
    machine.put(
        "unbroken", 'trap "sleep 0.5; echo saved >> $CALLS; exit 143" TERM; sleep 1 & echo up >> "$CALLS"; wait; wait'
    )
    job = machine.start(FILES / "unbroken-job", "c.yaml")
    machine.wait_for("up")
    job.terminate()
    job.communicate(timeout=30)
    assert job.returncode == 143 and machine.called("saved")


class _Metadata(http.server.BaseHTTPRequestHandler):
    """EC2's metadata service: no notice at first."""

    asked = 0

    def do_PUT(self) -> None:
        self._answer(200, "token")

    def do_GET(self) -> None:
        type(self).asked += 1
        known = self.headers["X-aws-ec2-metadata-token"] == "token" and type(self).asked > 2
        self._answer(200 if known else 404, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_spot_notice_reaches_ray(machine: Machine):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    script = machine.start(FILES / "aws/drain-on-notice", "head:6379", METADATA_URL=url, POLL_S="0.05")
    output = script.communicate(timeout=30)[0]
    server.shutdown()
    server.server_close()
    assert script.returncode == 0 and "terminate" in output
    (call,) = machine.called("ray")
    assert call.startswith("ray drain-node --address head:6379 --reason DRAIN_NODE_REASON_PREEMPTION")
    assert call.endswith("--deadline-remaining-seconds 55")


@pytest.mark.parametrize("rank", [0, 1])
def test_skypilot_runs_the_driver_on_the_first_node(machine: Machine, rank: int):
    (machine.folder / "run").write_text(yaml.safe_load((FILES / "skypilot/task.yaml").read_text())["run"])
    machine.put("unbroken", 'echo "unbroken $* $RAY_ADDRESS" >> "$CALLS"; exit 4')
    machine.put("ray", 'echo "ray $*" >> "$CALLS"')
    environment = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": str(rank)}
    job = machine.start("run", **environment)
    job.communicate(timeout=30)
    assert job.returncode == (4 if rank == 0 else 0)
    assert machine.called("unbroken") == (["unbroken train config.yaml 10.0.0.1:6479"] if rank == 0 else [])
    (start,) = machine.called("ray start")
    assert "--num-gpus=1" in start and ("--head" in start) == (rank == 0)


@pytest.mark.s3
def test_compose_makes_its_bucket(s3_server, monkeypatch: pytest.MonkeyPatch):
    command = yaml.safe_load((FILES / "compose/compose.yaml").read_text())["services"]["bucket"]["command"]
    for _ in range(2):  # a second `up` finds it
        environment = {**os.environ, **s3_server.environment(), "BUCKET": "made-by-compose"}
        subprocess.run([sys.executable, *command[1:]], env=environment, check=True, timeout=60)
    assert s3_server.client.exists("made-by-compose")


def _commands() -> list[list[str]]:
    """Every call of `ray` and `unbroken` in the files, as words."""
    found = []
    for path in sorted(path for path in FILES.rglob("*") if path.is_file() and path.suffix not in (".md", ".json")):
        text = path.read_text()
        lines = (
            _strings(list(yaml.safe_load_all(text)))
            if path.suffix == ".yaml"
            else text.replace("\\\n", " ").split("\n")
        )
        for line in lines:
            for part in re.split(r"&& | \|\| |; |until |sh -c '| > | 2> | & |&$", "" if line.startswith("#") else line):
                try:
                    words = shlex.split(part)
                except ValueError:  # prose with an apostrophe
                    continue
                names = [word.rpartition("/")[2] for word in words]
                at = next((i for i, name in enumerate(names) if name in ("ray", "unbroken")), len(names))
                if at + 1 < len(names) and words[at + 1] in CLUSTER_COMMANDS:
                    found.append([names[at], *words[at + 1 :]])
    return found


def _strings(value: object) -> list[str]:
    """The lines of every text in a YAML document; a list that is a command, as one line."""
    match value:
        case dict():
            return _strings(list(value.values()))
        case str():
            return value.splitlines()
        case ["ray" | "unbroken", *_] if all(isinstance(word, str) for word in value):
            return [shlex.join(value)]
        case list():
            return [line for item in value for line in _strings(item)]
    return []


CLUSTER_COMMANDS = {"start", "stop", "job", "health-check", "drain-node", "train", "checkpoints"}


def test_every_command_line_is_one_that_ray_or_unbroken_takes():
    seen = set()
    for program, *words in _commands():
        command: click.Command = ray_cli if program == "ray" else unbroken_cli
        while isinstance(command, click.Group):
            assert words[0] in command.commands, (program, words)
            seen.add(f"{program} {words[0]}")
            command, words = command.commands[words[0]], words[1:]
        passed_on = ["config.yaml"] if program == "unbroken" and words == ["$@"] else []
        given = [re.sub(r"\$\$?\{?(NODE_CPUS|NODE_GPUS|DRAIN_S)\}?", "1", word) for word in words if word != "$@"]
        command.make_context(program, given or passed_on)  # refuses unknown options and wrong values
    assert seen >= {"ray start", "ray stop", "ray drain-node", "ray health-check", "ray submit", "unbroken train"}
    assert "unbroken prune" in seen
