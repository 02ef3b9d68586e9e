"""A text encoder of its own, in transformers' form, for models of pixels: frozen, the same on every rank."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trainers.conditioning import Condition, ConditioningConfig
from trainers.errors import ConfigError
from trainers.identity import tensors_hash
from trainers.pipeline import encode_text
from trainers.pretrained import opened_weights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KEPT_BYTES = 256 * 2**20
_UNLIMITED = 10**6  # what a tokenizer without a limit says is far beyond it


class TextEncoder:
    """Makes tokens of captions.

    Each caption is encoded alone, so that its numbers depend on nothing but itself and may be kept: a small data set
    is encoded once, not in every epoch.
    """

    def __init__(self, tokenizer: Any, model: Any, max_tokens: int, device: torch.device) -> None:
        """Args: max_tokens: of each caption, longer ones are cut."""
        self.tokenizer, self.model = tokenizer, model.to(device).eval().requires_grad_(False)
        self.max_tokens = max_tokens
        self.hashes = {"text_encoder": tensors_hash(model)}
        size = max_tokens * model.config.hidden_size * torch.finfo(torch.float32).bits // 8
        self._tokens = functools.lru_cache(max(1, _KEPT_BYTES // size))(self._encode)

    def latents(self, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """`images` themselves, as `FrozenParts.latents` without a VAE."""
        return images

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` themselves, as `FrozenParts.images` without a VAE."""
        return latents

    def condition(
        self, labels: torch.Tensor | None, captions: tuple[str, ...] | None, sizes: torch.Tensor | None
    ) -> Condition:
        """The condition of B samples, on the device, float32: as `FrozenParts.condition`, but without sizes."""
        assert captions is not None, "models of text are not trained without captions"
        return Condition(tokens=torch.stack([self._tokens(caption) for caption in captions]))

    def _encode(self, caption: str) -> torch.Tensor:
        """(max_tokens, D) float32, zero beyond the end of the caption."""
        return encode_text(self.tokenizer, self.model, caption, self.max_tokens).float()


@functools.lru_cache(maxsize=1)  # several images are drawn one part after the other
def open_text_encoder(config: ConditioningConfig, device: torch.device) -> TextEncoder:
    """The text encoder in `config.text_encoder`. Local.

    Raises:
        ConfigError: it can not be loaded, or transformers is not installed.
    """
    assert config.text_encoder is not None
    folder = Path(config.text_encoder).expanduser()
    try:
        import transformers  # an optional package, and 2 s of imports that only text needs
    except ImportError as error:
        raise ConfigError("conditioning.text_encoder needs transformers; pip install 'unbroken[text]'") from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it advises on parts that nobody asked for
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = transformers.AutoModelForTextEncoding.from_pretrained(
            folder, dtype=_DTYPES[config.precision], local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"conditioning.text_encoder={config.text_encoder} can not be loaded: {str(error).splitlines()[0]}; give a"
            " folder with the model and the tokenizer of a text encoder (BERT, CLIP, T5, ...)"
        ) from error
    limit = getattr(model.config, "max_position_embeddings", None) or _UNLIMITED
    most = min(tokenizer.model_max_length, limit)
    if (config.max_tokens or most) > most or (most >= _UNLIMITED and config.max_tokens is None):
        known = "null" if config.max_tokens is None else config.max_tokens
        raise ConfigError(
            f"conditioning.max_tokens={known}, but {folder} has no such limit; give a number below {most}"
        )
    return TextEncoder(tokenizer, model, config.max_tokens or most, device)


def encoder_facts(config: ConditioningConfig) -> tuple[int, int]:
    """Width of the tokens that `config.text_encoder` makes, and the number of its elements, without loading it.

    Raises:
        ConfigError: there is no such folder.
    """
    assert config.text_encoder is not None
    folder = Path(config.text_encoder).expanduser()
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = settings.get("hidden_size") or settings["d_model"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"conditioning.text_encoder={config.text_encoder} is no folder of a text encoder ({error!r}); give one with"
            " config.json, weights and tokenizer, as save_pretrained of transformers writes it"
        ) from error
    count = 0
    for file in folder.glob("*.safetensors"):
        with opened_weights(file) as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())
    return width, count
