"""The measured programs and where they run: ours under Ray Train or torchrun, and others under torchrun."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.arm import Arm


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder for everything that the programs write; gone when the block is left."""
    # A short name: Ray's sockets lie below it, and their paths must stay under 108 characters.
    with tempfile.TemporaryDirectory(prefix="ub-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """The config that all programs of a comparison read.

    Args:
        config: a `RunConfig` as plain values, without its storage.
    """
    file = folder / "config.json"
    file.write_text(json.dumps({**config, "storage": str(folder / "runs")}))
    return file


def under_ray(folder: Path, file: Path) -> Arm:
    """Ours under Ray Train."""
    return Arm("ray", ["-m", "bench.under_ray", str(file)], {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"})


def under_torchrun(name: str, module: str, arguments: Sequence[str], num_workers: int = 2) -> Arm:
    """A module that trains in every rank, restarted whenever one of them dies."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={num_workers}", "--max-restarts=1000"]
    return Arm(name, [*torchrun, f"--master-port={free_port()}", "-m", module, *arguments], {})


@contextlib.contextmanager
def plain_ray(config: dict[str, Any], every: int) -> Iterator[Arm]:
    """Ray Train with torch's checkpoints every so many steps, in a place of its own.

    Args:
        config: as for `write_config`.
    """
    with _own_ray("plain ray", "bench.peers.ray_train_loop", config, str(every)) as arm:
        yield arm


@contextlib.contextmanager
def torchft(name: str, config: dict[str, Any], lighthouse: Mapping[str, int]) -> Iterator[Arm]:
    """Ray Train with torchft's replicas, in a place of its own.

    Args:
        config: as for `write_config`.
        lighthouse: settings of torchft's server that differ from its defaults.
    """
    with _own_ray(name, "bench.peers.torchft_loop", config, json.dumps(lighthouse)) as arm:
        yield arm


@contextlib.contextmanager
def _own_ray(name: str, module: str, config: dict[str, Any], argument: str) -> Iterator[Arm]:
    with workplace() as folder:
        arguments = ["-m", module, str(write_config(folder, config)), str(folder), argument]
        with Arm(name, arguments, {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled"}) as arm:
            yield arm


@contextlib.contextmanager
def both(config: dict[str, Any], bare_keeps_state: bool) -> Iterator[tuple[Arm, Arm]]:
    """(ours under Ray Train, the bare loop), both started; ended, with all they wrote, when the block is left.

    Args:
        config: as for `write_config`.
        bare_keeps_state: the bare loop saves and loads its state, with an EMA in it.
    """
    with workplace() as folder:
        file = write_config(folder, config)
        arguments = [str(file)]
        if bare_keeps_state:
            (folder / "state").mkdir()
            arguments += ["--state", str(folder / "state")]
        with (
            under_ray(folder, file) as ours,
            under_torchrun("torchrun", "bench.bare_loop", arguments, config["workers"]) as bare,
        ):
            yield ours, bare


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
