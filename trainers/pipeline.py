"""Copied into exports as `pipeline.py`: a diffusers pipeline for models of pixels, with classes, text and guidance.

It stands alone (torch and diffusers only), because whoever loads the export does not have this package.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


@torch.no_grad()
def encode_text(tokenizer: Any, text_encoder: Any, text: str, max_tokens: int) -> torch.Tensor:
    """(max_tokens, D): how the encoder sees `text`; zero beyond its end, whatever the encoder makes of padding."""
    inputs = tokenizer([text], padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    inputs = inputs.to(text_encoder.device)
    states = text_encoder(**inputs).last_hidden_state[0]
    return states * inputs["attention_mask"][0, :, None]


class UnbrokenPipeline(DiffusionPipeline):
    """Images from an unconditional or class-conditional model of pixels, or from one of text.

    `DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)` makes one.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012  (diffusers' own way to say so)
    unet: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self, unet, scheduler, text_encoder=None, tokenizer=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | str | list[int] | list[str] | None = None,
        num_images: int = 1,
        guidance: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw images.

        Args:
            labels: for each image its class, or its text for a model of text; one alone stands for all images.
            num_images: how many, where `labels` and `noise` do not say.
            guidance: strength of classifier-free guidance; 1 is none.
            noise: (N, C, H, W) to start from, instead of noise from `generator`.
            output_type: pil, np or pt; arrays and tensors are in [0, 1].
        """
        config, device = self.unet.config, self._execution_device
        if isinstance(labels, list):
            num_images = len(labels)
        if noise is None:
            shape = (num_images, config["in_channels"], config["sample_size"], config["sample_size"])
            noise = torch.randn(shape, generator=generator, device=generator.device if generator else device)
        if labels is None and guidance != 1:
            raise ValueError(f"guidance={guidance} needs a class-conditional model, or one of text; use guidance=1")
        given = self._conditioning(labels, len(noise))
        dropped = {} if labels is None else self._conditioning("" if self.tokenizer else self._null_label(), len(noise))
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = noise.to(device, self.unet.dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_input = getattr(self.scheduler, "scale_model_input", lambda x, _: x)
        for t in self.progress_bar(self.scheduler.timesteps):  # pyright: ignore  (its decorator hides its type)
            noisy = scale_input(x, t)
            prediction = self._predict(noisy, t, given)
            if guidance != 1:
                without = self._predict(noisy, t, dropped)
                prediction = without + guidance * (prediction - without)
            x = self.scheduler.step(prediction, t, x).prev_sample
        images: Any = (x / 2 + 0.5).clamp(0, 1).float().cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images)

    def _predict(self, x, t, conditioning):
        # By position: the image argument is called `sample` in UNets and `hidden_states` in transformers.
        prediction = self.unet(x, timestep=t.expand(len(x)), **conditioning, return_dict=False)[0]
        return prediction.chunk(2, dim=1)[0] if prediction.shape[1] == 2 * x.shape[1] else prediction

    def _null_label(self):
        config = self.unet.config
        if config.get("num_embeds_ada_norm") is not None:
            return config["num_embeds_ada_norm"]
        rows = config.get("num_class_embeds")
        return None if rows is None else rows - 1

    def _conditioning(self, labels, num_images):
        kind = "is class-conditional; give labels"
        if self.tokenizer is not None:
            kind = "draws what a text says; give texts as labels"
        elif self._null_label() is None:
            kind = "has neither classes nor text; leave labels out"
        labels = labels if isinstance(labels, list) else [labels] * num_images
        expected = str if self.tokenizer is not None else type(None) if self._null_label() is None else int
        if not all(isinstance(label, expected) for label in labels):
            raise ValueError(f"labels={labels}, but the model {kind}")
        if len(labels) != num_images:
            raise ValueError(f"{len(labels)} labels for {num_images} images; give one for each")
        if expected is int:
            return {"class_labels": torch.tensor(labels, device=self._execution_device)}
        if expected is str:
            # Each alone, as in training: together they would be rounded otherwise.
            tokenizer: Any = self.tokenizer
            size = tokenizer.model_max_length
            tokens = [encode_text(tokenizer, self.text_encoder, text, size) for text in labels]
            return {"encoder_hidden_states": torch.stack(tokens).to(self.unet.dtype)}
        return {}
