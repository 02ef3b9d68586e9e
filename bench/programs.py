"""The two measured programs on one config: ours under Ray Train, and a bare torch loop under torchrun."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.arm import Arm


@contextlib.contextmanager
def both(config: dict[str, Any], bare_keeps_state: bool) -> Iterator[tuple[Arm, Arm]]:
    """(ours, torchrun), both started; ended, with all they wrote, when the block is left.

    Args:
        config: a `RunConfig` as plain values, without its storage.
        bare_keeps_state: the bare loop saves and loads its state, with an EMA in it.
    """
    # A short name: Ray's sockets lie below it, and their paths must stay under 108 characters.
    with tempfile.TemporaryDirectory(prefix="ub-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        file = folder / "config.json"
        file.write_text(json.dumps({**config, "storage": str(folder / "runs")}))
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={config['workers']}", "--max-restarts=1000"]
        torchrun += [f"--master-port={_free_port()}", "-m", "bench.bare_loop", str(file)]
        if bare_keeps_state:
            (folder / "state").mkdir()
            torchrun.append(str(folder / "state"))
        with (
            Arm("ray", ["-m", "bench.under_ray", str(file)], {"RAY_TMPDIR": name, "RAY_AUTH_MODE": "disabled"}) as ours,
            Arm("torchrun", torchrun, {}) as bare,
        ):
            yield ours, bare


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
