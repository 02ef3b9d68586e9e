"""Training objectives: what the network predicts, from how noisy an input, and how its error is weighted."""

from __future__ import annotations

from trainers.objectives.config import ObjectiveConfig
from trainers.objectives.objective import Objective

__all__ = ["Objective", "ObjectiveConfig"]
