"""The Slurm script starts a real Ray cluster and trains on it; the time limit comes, and the job goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.config import load_config
from orchestrator.deploy.render import render
from tests.deploy.conftest import ROOT
from tests.deploy.test_scripts import Machine
from tests.s3.server import free_ports
from tests.trainers.tiny import tiny_config

# Two Ray nodes on one machine, beside other clusters: each its own ports.
PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
HEAD_PORTS = ("ray-client-server-port",)


def _config(folder: Path) -> Path:
    config = tiny_config(train={"num_steps": 40, "global_batch_size": 64, "microbatch_size": 16})
    config |= {"run": {"name": "run"}, "storage": str(folder / "runs"), "workers": 2, "checkpoint": {"every_steps": 5}}
    config |= {"deploy": {"shared_storage": True, "memory_gib": 3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def _free_job_id() -> int:
    """One whose cluster gets a port that is free: 20000 + id."""
    return next(id for id in range(os.getpid() % 9000, 10000) if _is_free(20000 + id))


def _is_free(port: int) -> bool:
    return subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], capture_output=True).returncode != 0


def _processes(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_trains_is_queued_again_and_finishes(tmp_path: Path):
    machine = Machine(tmp_path)
    render(load_config(_config(tmp_path)), "slurm", tmp_path)
    machine.put("unbroken", f'exec {sys.executable} -m orchestrator "$@"')
    machine.put("ray", f'exec {Path(sys.executable).parent / "ray"} "$@"')
    port = iter(free_ports(2 * len(PORTS) + len(HEAD_PORTS)))
    for name, options in (("head", PORTS + HEAD_PORTS), ("worker", PORTS)):
        (tmp_path / name).write_text(" ".join(f"--{option}={next(port)}" for option in options))
    machine.put(
        "srun",
        f'while [[ $1 == --* ]]; do shift; done; kind=worker; [[ " $* " == *" --head "* ]] && kind=head\n'
        f'exec "$@" $(cat {tmp_path}/$kind) --object-store-memory=100000000'
        " --min-worker-port=0 --max-worker-port=0 --node-ip-address=127.0.0.1",
    )
    job_id = str(_free_job_id())
    environment = {
        **os.environ,
        "PATH": f"{machine.bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CALLS": str(machine.calls),
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NODELIST": "[localhost,b]",
    }
    outputs = []
    for restart in (0, 1):
        job = subprocess.Popen(
            ["bash", tmp_path / "slurm/train.sbatch"],
            cwd=tmp_path / "slurm",
            env={**environment, "SLURM_RESTART_COUNT": str(restart)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert job.stdout is not None
        with job.stdout:
            lines = []
            for line in job.stdout:
                lines.append(line)
                if restart == 0 and re.search("newest stable checkpoint: step", line):
                    job.send_signal(signal.SIGUSR1)
                    restart = -1
        outputs.append("".join(lines))
        # The first ends as the driver did: 143, or 139 if Ray's threads crash while the interpreter ends.
        assert job.wait() in ((143, 139) if len(outputs) == 1 else (0,)), outputs[-1]
    assert machine.called("scontrol requeue") == [f"scontrol requeue {job_id}"]
    assert "goes on from step 0" in outputs[0] and "goes on from step 0" not in outputs[1]
    assert re.search(r"goes on from step [1-9]", outputs[1]) and "finished: step 40 " in outputs[1]
    assert _processes(f"/tmp/unbroken-{job_id}") == [] and not Path(f"/tmp/unbroken-{job_id}").exists()
