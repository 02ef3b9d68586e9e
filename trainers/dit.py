"""What a new DiT of diffusers lacks to be trained as its paper does: diffusers has it to draw from trained weights."""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding
from torch import nn


def prepare_dit(model: nn.Module) -> None:
    """Give a new `DiTTransformer2DModel` the first weights of its paper, and stop it from dropping labels. In place.

    It begins with blocks that change nothing and predicts zero (adaLN-Zero). Weights are drawn from torch's generator.

    Source: Peebles and Xie, "Scalable diffusion models with transformers", 2023, section 3.2, and
    `DiT.initialize_weights` of the authors' models.py.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
            # Each block has one of its own and would draw for itself, so no image would ever be without its label in
            # all of them, and guidance would lead away from what was never learnt: see `objective.label_drop`.
            module.dropout_prob = 0.0
    parts = cast(Any, model)
    patches = parts.pos_embed.proj  # as the linear layer that it is
    nn.init.xavier_uniform_(patches.weight.data.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)
    for last in (*(block.norm1.linear for block in parts.transformer_blocks), parts.proj_out_1, parts.proj_out_2):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
