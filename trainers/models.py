"""Models by their diffusers class name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained."""

    class_name: str
    """A diffusers ModelMixin by name: UNet2DModel, DiTTransformer2DModel, ..."""
    args: dict[str, Any] = field(default_factory=dict)
    """The arguments of that class."""
