"""Distances between drawn and real images in the features of a network, and how well images fit their texts.

A number means something only beside others of the same network, so the network's name is a part of the number's name:
`fid/inception`, or `fid/<file>-<hash>` for a network of one's own.
"""

from __future__ import annotations

import hashlib
import urllib.error
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers.errors import ConfigError
from trainers.evaluation.config import INCEPTION, MetricsConfig

_BATCH_SIZE = 64
_INSTALL = "pip install 'unbroken[evaluation]'"


class FeatureNetwork:
    """Maps images to features, in evaluation mode."""

    def __init__(self, name: str, module: Any, device: torch.device) -> None:
        self.name = name
        self._module = module
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) uint8, C = 1 or 3, to (N, D) float32 on the CPU."""
        parts = []
        for part in pixels.split(_BATCH_SIZE):
            features = self._module(part.expand(-1, 3, -1, -1).contiguous().to(self._device))
            if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(part):
                shape = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
                raise ConfigError(
                    f"network {self.name} makes {shape} of {len(part)} images; give one that takes (N, 3, H, W) uint8"
                    " and returns (N, D) features"
                )
            parts.append(features.float().cpu())
        return torch.cat(parts)


def open_network(which: str, device: torch.device) -> FeatureNetwork:
    """The network that `which` names: `inception`, or the path of one's own.

    One's own takes (N, 3, H, W) uint8 for any N and returns (N, D): a TorchScript file, or a program of `torch.export`
    (.pt2).

    Raises:
        ConfigError: it can not be had or loaded.
    """
    if which == INCEPTION:
        return FeatureNetwork(INCEPTION, _inception().to(device), device)
    path = Path(which)
    if not zipfile.is_zipfile(path):  # both kinds are
        raise ConfigError(f"network={which} is neither {INCEPTION} nor the file of a TorchScript or .pt2 network")
    try:
        if path.suffix == ".pt2":
            module: Any = torch.export.load(path).module().to(device)
        else:
            with warnings.catch_warnings():
                # What there is of networks in one file is TorchScript, whatever torch thinks of new ones.
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"network={which} can not be loaded: {reason}; give TorchScript, or a .pt2 file") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureNetwork(f"{path.stem}-{digest[:8]}", module, device)


def _inception() -> nn.Module:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3  # an optional package

        return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).eval()
    except ModuleNotFoundError as error:
        raise ConfigError(f"network={INCEPTION} needs torch-fidelity and torchmetrics; {_INSTALL}") from error
    except (urllib.error.URLError, OSError) as error:
        raise ConfigError(
            f"network={INCEPTION}: its weights are not here and can not be downloaded ({error}); give a network of"
            " your own as a file"
        ) from error


class _Known(nn.Module):
    """In place of the network, where features are known: those of drawn images are needed by two metrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """FID of two sets of features, (N, D) and (M, D). Biased upwards where they are not many more than D.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", 2017, eq. 6.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance  # an optional package
    except ModuleNotFoundError as error:
        raise ConfigError(f"FID needs torchmetrics; {_INSTALL}") from error
    metric = FrechetInceptionDistance(feature=_Known(real.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return float(metric.compute())


def kernel_distance(real: torch.Tensor, drawn: torch.Tensor, seed: int) -> tuple[float, float]:
    """KID of two sets of features, (N, D) and (M, D): mean and standard deviation over 100 subsets. Unbiased.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, section 4.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance  # an optional package
    except ModuleNotFoundError as error:
        raise ConfigError(f"KID needs torchmetrics; {_INSTALL}") from error
    # Half of the images at most: the deviation of subsets that are all alike says nothing.
    size = min(1000, max(2, min(len(real), len(drawn)) // 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric .* will save all extracted features")  # they are here anyway
        metric = KernelInceptionDistance(
            feature=_Known(real.shape[1]), subsets=100, subset_size=size, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class ClipScore:
    """100 times the mean cosine between what a CLIP model makes of images and of their texts.

    Source: Hessel et al., "CLIPScore", 2021, section 3, with w = 1 as torchmetrics has it.
    """

    def __init__(self, name: str, metric: Any, device: torch.device) -> None:
        self.name = name
        self._metric = metric.to(device)
        self._device = device

    def __call__(self, pixels: torch.Tensor, texts: Sequence[str]) -> float:
        """Args: pixels: (N, C, H, W) uint8, C = 1 or 3; texts: N of them."""
        self._metric.reset()
        for begin in range(0, len(texts), _BATCH_SIZE):
            part = pixels[begin : begin + _BATCH_SIZE].expand(-1, 3, -1, -1).to(self._device)
            self._metric.update(part, list(texts[begin : begin + _BATCH_SIZE]))
        return float(self._metric.compute())


def open_clip(which: str, device: torch.device) -> ClipScore:
    """The CLIP score by the model in a folder, with its processor, or of a name on the hub.

    Raises:
        ConfigError: it can not be loaded.
    """
    try:
        import transformers  # optional packages
        from torchmetrics.multimodal import CLIPScore
    except ImportError as error:
        raise ConfigError(f"the CLIP score needs torchmetrics and transformers; {_INSTALL}") from error
    try:
        model = _Clip(transformers.CLIPModel.from_pretrained(which).eval())
        processor = transformers.CLIPProcessor.from_pretrained(which)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"clip={which} can not be loaded: {reason}; give a folder with a CLIP model") from error
    metric = CLIPScore(lambda: (model, processor), sync_on_compute=False)  # pyright: ignore[reportArgumentType]
    return ClipScore(_clip_name(which), metric, device)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What images are measured with; what is not asked for is None."""

    features: FeatureNetwork | None
    clip: ClipScore | None


def open_networks(config: MetricsConfig, device: torch.device) -> Networks:
    """Those that `config` names. Raises ConfigError as `open_network` and `open_clip` do."""
    features = None if set(config.names) == {"clip"} else open_network(config.network, device)
    return Networks(features=features, clip=None if config.clip is None else open_clip(config.clip, device))


class _Clip(nn.Module):
    """A CLIP model of transformers 5, for a metric that knows those of 4: they returned the features alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _pooled(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _pooled(self.model.get_text_features(*inputs))


def _pooled(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def _clip_name(which: str) -> str:
    """Of a folder its name and what its weights hash to; of a model on the hub its name there."""
    folder, digest = Path(which), hashlib.sha256()
    if not folder.is_dir():
        return which.replace("/", "-")
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return f"{folder.resolve().name}-{digest.hexdigest()[:8]}"
