"""Training objectives: what the network predicts, and how its error is weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network learns to predict, on which noise schedule."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon"
    """epsilon (noise), v_prediction, sample (x0), or flow (rectified flow velocity)."""
    num_train_timesteps: int = 1000
    """Number of noise levels, >= 1."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule in diffusers' words; not used by flow."""
    weighting: Literal["none", "min_snr"] = "none"
    """Loss weight of a noise level."""
    min_snr_gamma: float = 5.0
    """Gamma of min-SNR, > 0."""
    label_drop: float = 0.1
    """Share of samples trained without their label, 0 <= p <= 1; 0 for models without classes."""
