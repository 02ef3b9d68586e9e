"""Copied into every export as `pipeline.py`: a diffusers pipeline that also takes class labels and guidance.

It stands alone (torch and diffusers only), because whoever loads the export does not have this package.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput


class UnbrokenPipeline(DiffusionPipeline):
    """Images from an unconditional or class-conditional model of pixels.

    `DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)` makes one.
    """

    model_cpu_offload_seq = "unet"
    unet: Any
    scheduler: Any

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | list[int] | None = None,
        num_images: int = 1,
        guidance: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw images.

        Args:
            labels: one class an image, for class-conditional models only; one number stands for all images.
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
        given = self._labels(labels, len(noise))
        dropped = None if given is None else torch.full_like(given, self._null_label() or 0)
        if dropped is None and guidance != 1:
            raise ValueError(f"guidance={guidance} needs a class-conditional model; use guidance=1")
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

    def _predict(self, x, t, labels):
        conditioning = {} if labels is None else {"class_labels": labels}
        # By position: the image argument is called `sample` in UNets and `hidden_states` in transformers.
        prediction = self.unet(x, timestep=t.expand(len(x)), **conditioning, return_dict=False)[0]
        return prediction.chunk(2, dim=1)[0] if prediction.shape[1] == 2 * x.shape[1] else prediction

    def _null_label(self):
        config = self.unet.config
        if config.get("num_embeds_ada_norm") is not None:
            return config["num_embeds_ada_norm"]
        rows = config.get("num_class_embeds")
        return None if rows is None else rows - 1

    def _labels(self, labels, num_images):
        if (labels is None) != (self._null_label() is None):
            kind = "has no classes; leave labels out" if labels is not None else "is class-conditional; give labels"
            raise ValueError(f"labels={labels}, but the model {kind}")
        if labels is None:
            return None
        labels = labels if isinstance(labels, list) else [labels] * num_images
        if len(labels) != num_images:
            raise ValueError(f"{len(labels)} labels for {num_images} images; give one for each")
        return torch.tensor(labels, device=self._execution_device)
