"""Imported by the fork server of a drilled run: makes the noise of chosen samples not a number.

Which ones is the same for every process and every attempt, as it would be with a broken data set.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import trainers.step
from orchestrator.chaos.faults import NAN_POSITIONS
from trainers.data.batch import Batch, load_microbatch


def _load_microbatch(source: Any, positions: np.ndarray, **arguments: Any) -> Batch:
    batch = load_microbatch(source, positions, **arguments)
    hit = np.isin(positions, _poisoned)
    if not hit.any():
        return batch
    mask = torch.from_numpy(hit).reshape(-1, *[1] * (batch.noise.ndim - 1))
    return replace(batch, noise=batch.noise.masked_fill(mask, float("nan")))


_poisoned = np.array([int(position) for position in os.environ.get(NAN_POSITIONS, "").split(",") if position], np.int64)
trainers.step.load_microbatch = _load_microbatch
