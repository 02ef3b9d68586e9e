"""The contract on GPUs, without Ray: one final state, however often and on however many of them it is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.tiny import DIT, UNET, tiny_config

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not NUM_GPUS, reason="there is no GPU here")]
CONFIGS = {
    "unet": tiny_config(UNET),
    "dit": tiny_config(
        DIT,
        objective={"prediction_type": "flow", "weighting": "none", "label_drop": 0.1},
        schedule={"warmup_steps": 0},
        train={"precision": "bf16"},
    ),
}


def fingerprint(config: dict[str, Any], num_ranks: int, folder: Path) -> str:
    """Of the final state, by `torchrun -m trainers`."""
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    result = subprocess.run([*command, "-m", "trainers", str(file)], text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("fingerprint of the state after step 4: ")[1].split()[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_state_for_every_layout(name: str, tmp_path: Path) -> None:
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {"strategy": "fsdp"}), (1, {"strategy": "ddp"})]
    for num_ranks in range(2, min(NUM_GPUS, 4) + 1):
        layouts += [(num_ranks, {"strategy": strategy}) for strategy in ("fsdp", "ddp")]
        layouts += [(num_ranks, {"strategy": "fsdp", "accumulation": "sharded"})]
    expected = fingerprint(CONFIGS[name], 1, tmp_path)
    for num_ranks, parallel in layouts:
        assert fingerprint({**CONFIGS[name], "parallel": parallel}, num_ranks, tmp_path) == expected, parallel
