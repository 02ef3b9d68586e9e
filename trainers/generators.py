"""The global random generators as a part of the state.

Nothing of ours depends on them, since `trainers.rng` derives every draw anew; they are captured and restored exactly
for code that users plug in, which may draw from them between the forward passes.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from trainers.rng import seed_global_generators


class GeneratorStates:
    """The states of torch's, numpy's and python's global generators, as byte tensors of fixed size."""

    def __init__(self) -> None:
        self.tensors = {name: torch.from_numpy(state) for name, state in _read().items()}
        """(N,) uint8 each; the same on all ranks after `settle`."""

    def capture(self) -> None:
        """Read the generators into `tensors`. Local."""
        for name, state in _read().items():
            self.tensors[name].copy_(torch.from_numpy(state))

    def apply(self) -> None:
        """Set the generators from `tensors`. Local."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"])
        words, (gauss,) = _split(self.tensors["python"], 625)
        random.setstate((3, tuple(words.tolist()), None if np.isnan(gauss) else float(gauss)))
        words, (position, has_gauss, cached) = _split(self.tensors["numpy"], 624)
        np.random.set_state(("MT19937", words, int(position), int(has_gauss), float(cached)))


def settle(seed: int, step: int, num_microbatches: int) -> None:
    """Leave the global generators in a state that depends on the step alone, not on the last microbatch run here."""
    seed_global_generators(seed, step, num_microbatches)


def _read() -> dict[str, np.ndarray]:
    version, words, gauss = random.getstate()
    assert version == 3
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    states = {
        "torch": torch.get_rng_state().numpy(),
        "python": _join(words, [np.nan if gauss is None else float(gauss)]),
        "numpy": _join(keys, [float(position), float(has_gauss), float(cached)]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return states


def _join(words: object, extra: list[float]) -> np.ndarray:
    joined = np.asarray(words, np.uint32).tobytes() + np.asarray(extra, np.float64).tobytes()
    return np.frombuffer(joined, np.uint8).copy()


def _split(state: torch.Tensor, num_words: int) -> tuple[np.ndarray, np.ndarray]:
    raw = state.numpy().tobytes()
    return np.frombuffer(raw[: 4 * num_words], np.uint32), np.frombuffer(raw[4 * num_words :], np.float64)
