"""How good the images of a checkpoint are: distances to those of the data, and to their texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from orchestrator.data.files import data_files
from orchestrator.weights import SavedModel
from trainers.conditioning import takes_text
from trainers.config import TrainerConfig
from trainers.data.guarded import GuardedSource
from trainers.data.sampler import sample_indices
from trainers.data.samples import Samples, Source
from trainers.data.sources import open_source
from trainers.errors import ConfigError
from trainers.evaluation.metrics import frechet_distance, kernel_distance, open_clip, open_network
from trainers.evaluation.split import split
from trainers.models import null_label
from trainers.rng import Stream, derive_seed
from trainers.sampling import draw, to_pixels, usual_guidance

METRICS = ("fid", "kid", "clip")
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured, and of which images."""

    metrics: tuple[str, ...]
    network: str
    """Of FID and KID: inception, or a file."""
    clip: str | None
    """Of the CLIP score: a folder, or a name on the hub."""
    num: int
    """Images to draw, and most of the data to compare with."""
    reference: Literal["all", "held-out"]
    guidance: float | None
    num_steps: int
    seed: int


def measure(saved: SavedModel, weights: str, request: Request, progress: Callable[[int], None]) -> dict[str, Any]:
    """The numbers that were asked for, and all that they depend on; ready for JSON.

    The images are drawn with the labels or captions of those that they are compared with.

    Args:
        progress: told of each number of images that were drawn.

    Raises:
        ConfigError: something is missing: weights, a network, a package, captions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "clip" in request.metrics and (request.clip is None or not saved.config.data.captions):
        missing = "a model of text" if request.clip else "--clip, a folder with a CLIP model"
        raise ConfigError(f"the CLIP score needs {missing}; leave it out of --metrics")
    features = [name for name in request.metrics if name != "clip"]
    network = open_network(request.network, device) if features else None  # first: it may not be there
    model = saved.load(weights).to(device)
    if request.guidance is None:
        guidance = usual_guidance(model, saved.config)
    else:
        guidance = request.guidance
    how = {"guidance": guidance, "num_steps": request.num_steps, "seed": request.seed}
    real, wanted = _reference(saved.config, request, model)
    drawn = _draw(model, saved.config, wanted, how, progress)
    found: dict[str, float] = {}
    notes = []
    if network is not None:
        ours, theirs = network(drawn), network(real)
        if "fid" in features:
            found[f"fid/{network.name}"] = frechet_distance(theirs, ours)
            if (fewest := min(len(real), len(drawn))) <= (width := ours.shape[1]):
                notes.append(f"fid of {fewest} images in {width} features is mostly bias; kid has none")
        if "kid" in features:
            found[f"kid/{network.name}"], found[f"kid_std/{network.name}"] = kernel_distance(theirs, ours, request.seed)
    if "clip" in request.metrics:
        assert request.clip is not None
        clip = open_clip(request.clip, device)
        found[f"clip/{clip.name}"] = clip(drawn, wanted)
    return {
        "run": saved.store.url,
        "step": saved.manifest.progress.step,
        "weights": saved.describe(weights),
        "num_drawn": len(drawn),
        "num_real": len(real),
        "reference": request.reference,
        **how,
        "metrics": found,
        "notes": notes,
    }


def _reference(config: TrainerConfig, request: Request, model: nn.Module) -> tuple[torch.Tensor, list[Any]]:
    """Images of the data, (N, C, H, W) uint8, in a fixed random order; and a label or caption for each one to draw."""
    source: Source = open_source(replace(config.data, buckets=None), data_files)
    source = GuardedSource(source, None, skip_broken=config.data.on_broken == "skip")
    if source.latents is not None:
        raise ConfigError("data.source=latents holds no images to compare with; give those that they were made of")
    members = np.arange(len(source))
    if request.reference == "held-out":
        _, held_out = split(config.validation, config.seed, len(source))
        if held_out is None:
            raise ConfigError("--reference held-out, but this run holds no samples out; take all")
        members = held_out
    order = sample_indices(config.seed, np.arange(min(request.num, len(members))), len(members))
    parts: list[Samples] = [
        source.read(members[order[begin : begin + _BATCH_SIZE]]) for begin in range(0, len(order), _BATCH_SIZE)
    ]
    known: list[Any] = [None] * len(order)
    if takes_text(model):
        known = [text for part in parts for text in part.captions or ()]
    elif null_label(model) is not None:
        known = [label for part in parts if part.labels is not None for label in part.labels.tolist()]
    pixels = torch.cat([to_pixels(part.images) for part in parts])
    return pixels, [known[index % len(known)] for index in range(request.num)]


def _draw(
    model: nn.Module, config: TrainerConfig, wanted: list[Any], how: dict[str, Any], progress: Callable[[int], None]
) -> torch.Tensor:
    """(N, C, H, W) uint8. Each part has a seed of its own, so that no two images begin with the same noise."""
    parts = []
    for index, begin in enumerate(range(0, len(wanted), _BATCH_SIZE)):
        part = wanted[begin : begin + _BATCH_SIZE]
        parts.append(
            to_pixels(draw(model, config, part, **{**how, "seed": derive_seed(how["seed"], Stream.SAMPLING, index)}))
        )
        progress(len(part))
    return torch.cat(parts)
