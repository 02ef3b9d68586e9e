"""The frozen parts of a pretrained pipeline: VAE, tokenizers and text encoders. Run, never trained, never saved."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from trainers.conditioning import Condition, ConditioningConfig
from trainers.data.batch import draw_latents
from trainers.errors import ConfigError
from trainers.identity import tensors_hash
from trainers.models import ModelConfig
from trainers.objectives import Objective, ObjectiveConfig
from trainers.pretrained import PretrainedFolder
from trainers.text_encoder import TextEncoder, open_text_encoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What a pipeline's `encode_prompt` returns: where in it are tokens, pooled text and mask.
_ENCODED: dict[str, tuple[int, int | None, int | None]] = {
    "StableDiffusionPipeline": (0, None, None),
    "StableDiffusionXLPipeline": (0, 2, None),
    "StableDiffusion3Pipeline": (0, 2, None),
    "FluxPipeline": (0, 1, None),
    "PixArtAlphaPipeline": (0, None, 1),
    "PixArtSigmaPipeline": (0, None, 1),
}
_SCHEDULE = (
    "prediction_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "rescale_betas_zero_snr",
    "trained_betas",
)
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def load_pipeline(
    model: ModelConfig, folder: PretrainedFolder, precision: str = "fp32", **parts: Any
) -> DiffusionPipeline:
    """The pipeline in `folder` with `parts` in place of its own, on the CPU and in evaluation mode.

    Raises:
        ConfigError: a part is missing, or cannot be loaded.
    """
    # Parts of their own variant are an exception (an export has `non_ema` for the network alone).
    others = (entry for name in folder.index if name != folder.part for entry in (folder.root / name).glob("*"))
    has_variant = model.variant is not None and any(f".{model.variant}." in file.name for file in others)
    absent = {name: None for name in _UNUSED if name in folder.index}
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # else it tells of every long caption, in every step, that it is cut
    _silence_transformers(folder)
    try:
        return DiffusionPipeline.from_pretrained(
            folder.root,
            dtype=_DTYPES[precision],
            variant=model.variant if has_variant else None,
            **{**absent, **parts},
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"model.pretrained={model.pretrained}: a frozen part cannot be loaded: {str(error).splitlines()[0]};"
            " complete the folder, or install what it needs"
        ) from error


def _silence_transformers(folder: PretrainedFolder) -> None:
    if any(entry[0] == "transformers" for entry in folder.index.values() if isinstance(entry, list)):
        import transformers  # 2 s of imports that only text needs

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # else it advises on parts that nobody asked for


class FrozenParts:
    """VAE and text encoders of a pipeline, the same on every rank."""

    def __init__(self, pipeline: DiffusionPipeline, config: ConditioningConfig, device: torch.device) -> None:
        self._pipeline: Any = pipeline.to(device)
        self._config = config
        self._device = device
        self._vae: Any = pipeline.components.get("vae")
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        for module in modules.values():
            module.eval().requires_grad_(False)
        self.hashes = {name: tensors_hash(module) for name, module in modules.items()}

    @torch.no_grad()
    def latents(self, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """What the network learns to make of noise: a draw of the VAE's latent, shifted and scaled.

        Args:
            images: (B, C, H, W) float32 in [-1, 1].
            noise: (B, c, h, w) float32, standard normal, in the shape of the latents: which draw it is. None without a
                VAE.

        Returns:
            (B, c, h, w) float32; `images` themselves without a VAE.
        """
        if self._vae is None or noise is None:
            return images
        mean, deviation = self.posterior(images)
        return draw_latents(mean, deviation, noise, *self.shift_and_scale)

    @property
    def shift_and_scale(self) -> tuple[float, float]:
        """What is taken from a draw of the VAE, and by what the rest is multiplied."""
        return self._vae.config.get("shift_factor") or 0.0, self._vae.config["scaling_factor"]

    @torch.no_grad()
    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents that the VAE finds likely, (B, c, h, w) float32 each."""
        found = self._vae.encode(images.to(self._vae.dtype)).latent_dist
        return found.mean.float(), found.std.float()

    @torch.no_grad()
    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """The images of `latents`, (B, C, H, W) float32 in about [-1, 1]; `latents` themselves without a VAE."""
        if self._vae is None:
            return latents
        shift, scale = self.shift_and_scale
        return self._vae.decode((latents / scale + shift).to(self._vae.dtype)).sample.float()

    @torch.no_grad()
    def condition(
        self, labels: torch.Tensor | None, captions: tuple[str, ...] | None, sizes: torch.Tensor | None
    ) -> Condition:
        """The condition of B samples, on the device, float32. Empty captions stand for no text."""
        if captions is None:
            return Condition(labels=labels, sizes=sizes)
        encoded = self._pipeline.encode_prompt(list(captions), **self._options())
        tokens_at, pooled_at, mask_at = _ENCODED[type(self._pipeline).__name__]
        tokens, pooled = encoded[tokens_at], None if pooled_at is None else encoded[pooled_at]
        if self._pipeline.config.get("force_zeros_for_empty_prompt"):
            # This pipeline shows its network zeros in place of an absent text, so train it on that too.
            present = torch.tensor([caption != "" for caption in captions], device=tokens.device)
            tokens = tokens * present[:, None, None]
            pooled = None if pooled is None else pooled * present[:, None]
        return Condition(
            tokens=tokens.float(),
            pooled=None if pooled is None else pooled.float(),
            mask=None if mask_at is None else encoded[mask_at],
            sizes=sizes,
            guidance=self._config.guidance,
        )

    def _options(self) -> dict[str, Any]:
        known = inspect.signature(self._pipeline.encode_prompt).parameters
        options = {
            "device": self._device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "prompt_2": None,
            "prompt_3": None,
            "max_sequence_length": self._config.max_tokens,
        }
        if self._config.max_tokens is None:
            del options["max_sequence_length"]
        return {name: value for name, value in options.items() if name in known}


Frozen = FrozenParts | TextEncoder
"""What makes numbers of images and captions, for a model out of a pipeline or for one of pixels."""


def open_frozen(model: ModelConfig, config: ConditioningConfig, device: torch.device) -> Frozen | None:
    """The frozen parts that go with the model; None for a model with neither pipeline nor text encoder. Local.

    Raises:
        ConfigError: a part is missing, or the pipeline is of a kind that is not known here.
    """
    if config.text_encoder is not None:
        return open_text_encoder(config, device)
    folder = model.folder()
    if folder is None or folder.part is None or not folder.index:
        return None
    absent = [name for name in folder.index if name.startswith("text_encoder") and not folder.has(name)]
    if absent:  # SD3 may be drawn from without its T5; its pipeline then asks the network what to put there
        raise ConfigError(
            f"model.pretrained={model.pretrained} has no {absent[0]}, which captions are encoded with; give a whole one"
        )
    pipeline = load_pipeline(model, folder, config.precision, **{folder.part: None})
    if (hasattr(pipeline, "encode_prompt") or folder.has("tokenizer")) and type(pipeline).__name__ not in _ENCODED:
        raise ConfigError(
            f"model.pretrained={model.pretrained} is a {type(pipeline).__name__}, whose text is not known here;"
            f" known are {', '.join(_ENCODED)}; of models of pixels give the network's folder and"
            " conditioning.text_encoder"
        )
    return FrozenParts(pipeline, config, device)


def pipeline_scheduler(folder: PretrainedFolder, objective: ObjectiveConfig) -> Any:
    """The sampler of an exported pipeline: the folder's own, on the noise schedule that was trained on."""
    ours: Any = Objective(objective).scheduler(pixels=not folder.has("vae"))
    shared = _shared_settings(folder.scheduler, ours)
    cls: Any = getattr(diffusers, folder.scheduler["_class_name"]) if shared else type(ours)
    known = inspect.signature(cls.__init__).parameters
    # Stable Diffusion's PNDM can not rescale its betas, and would draw on another schedule without a word.
    if shared is None or (objective.zero_terminal_snr and "rescale_betas_zero_snr" not in known):
        return ours
    taken = {key: ours.config[key] for key in shared if key in known}
    if objective.zero_terminal_snr and "timestep_spacing" in known:
        taken["timestep_spacing"] = "trailing"  # else its steps would not begin at pure noise (Lin et al., 2024, 3.3)
    return cls.from_config({**folder.scheduler, **taken})


def check_schedule(folder: PretrainedFolder, objective: ObjectiveConfig) -> None:
    """Check that pretrained weights go on with the noise schedule and the kind of prediction that they know.

    Raises:
        ConfigError: they don't; names the key, and what the folder has.
    """
    stored, ours = folder.scheduler, Objective(objective).scheduler()
    if not stored:
        return
    shared = _shared_settings(stored, ours)
    if shared is None:
        known = "objective.prediction_type=flow" if _is_flow(stored) else "another objective.prediction_type"
        differing = [known]
    else:
        names = {"rescale_betas_zero_snr": "zero_terminal_snr"}
        stored = {"prediction_type": "epsilon", **stored}  # what diffusers takes, and older folders do not say
        differing = [
            f"objective.{names.get(key, key)}={json.dumps(stored[key])}"
            for key in shared
            if key in stored and stored[key] != cast(Any, ours).config[key]
        ]
    if differing:
        raise ConfigError(
            f"objective: the weights in {folder.root} were trained with {', '.join(differing)} (its scheduler says so);"
            " set that, or model.from_scratch=true"
        )


def _shared_settings(stored: Mapping[str, Any], ours: Any) -> tuple[str, ...] | None:
    """What a stored sampler and ours must agree on; None if they are of different kinds."""
    kind = stored.get("_class_name", "")
    flow = _is_flow(stored)
    if not hasattr(diffusers, kind) or flow != _is_flow({"_class_name": type(ours).__name__}):
        return None
    if flow:
        # A dynamic shift follows from the size of the image, not from `shift`.
        return ("num_train_timesteps",) if stored.get("use_dynamic_shifting") else ("num_train_timesteps", "shift")
    return _SCHEDULE if "beta_schedule" in ours.config else None


def _is_flow(settings: Mapping[str, Any]) -> bool:
    return "FlowMatch" in settings.get("_class_name", "")


def latent_shape(folder: PretrainedFolder | None, channels: int | None, image_size: int) -> tuple[int, int, int] | None:
    """(c, h, w) of the latents of images of this kind; None without a VAE: then the images are denoised themselves.

    Args:
        channels: of the images; None: not asked for.

    Raises:
        ConfigError: the VAE takes no such images, or is of a kind that is not known here.
    """
    if folder is None or not folder.has("vae"):
        return None
    name = folder.index["vae"][1]
    if name != "AutoencoderKL":
        raise ConfigError(f"model.pretrained={folder.root}: its vae is a {name}; only AutoencoderKL is known here")
    with torch.device("meta"):  # only for its settings, with the defaults of the class filled in
        settings: Any = diffusers.AutoencoderKL.load_config(folder.root / "vae")
        vae: Any = diffusers.AutoencoderKL.from_config(settings)
    if channels is not None and vae.config["in_channels"] != channels:
        raise ConfigError(
            f"the VAE takes images of {vae.config['in_channels']} channels, but the data has {channels};"
            " take another data.source or another model.pretrained"
        )
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if image_size % factor:
        raise ConfigError(f"data.image_size={image_size} is not a multiple of the VAE's {factor}; set a multiple")
    return (vae.config["latent_channels"], image_size // factor, image_size // factor)
