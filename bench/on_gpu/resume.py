"""Whether a training that is put back to a snapshot makes the same bits again."""

from __future__ import annotations

from bench.figure import Figure
from bench.on_gpu.device import kernels, waited_s
from bench.on_gpu.snapshots import Snapshots
from bench.on_gpu.steps import Ours
from trainers.state import combined_fingerprint, fingerprints

NAME = "bitwise after a restore from the host (1: yes)"
_BEFORE = 2


def resume(ours: Ours, snapshots: Snapshots, num_steps: int) -> Figure:
    """Train, save, train on; load, train on again. Collective: all ranks.

    Raises:
        StateMismatchError: what was loaded is not what was saved.
    """
    with kernels(deterministic=True):
        _train(ours, _BEFORE)
        snapshots.save()
        saved = ours.state.progress
        straight = _train(ours, num_steps)
        load_s = waited_s(ours.device, snapshots.load)
        assert ours.state.progress == saved, (ours.state.progress, saved)
        again = _train(ours, num_steps)
    return Figure(
        name=f"{ours.part}: {NAME}",
        value=float(straight == again),
        goal=1.0,
        at_least=True,
        required=True,
        notes={
            "fingerprint without": straight,
            "with": again,
            f"{num_steps} steps each; seconds to hash the snapshot, load and check it": load_s,
        },
    )


def _train(ours: Ours, num_steps: int) -> str:
    """The fingerprint of the state after so many more steps."""
    for _ in range(num_steps):
        ours.step()
    ours.state.generators.capture()
    return combined_fingerprint(fingerprints(ours.state))
