"""diffusers' names of tensors, and those that the original code of each model gave them.

A rule is a regular expression and a replacement; all rules of a part are applied in turn. In a replacement `#n` marks
the n-th piece of a tensor that the original code keeps in one, and `~` one whose halves, scale and shift, it keeps in
the other order. Source: the inverse of diffusers' converters (`diffusers.loaders.single_file_utils`), which the tests
run on what is written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

_Tensors = Mapping[str, torch.Tensor]
_Rules = list[tuple[str, str]]


def to_original(pipeline: str, part: str, tensors: _Tensors, config: Any = None) -> dict[str, torch.Tensor]:
    """The tensors of a part of a pipeline under their original names, joined and turned as they are there.

    Args:
        pipeline: its class, one of `PIPELINES`.
        part: `unet`, `transformer`, `vae`, `text_encoder`, ...
        config: of a text encoder: it tells whose it is.
    """
    prefix, rules = PIPELINES[pipeline][part](tensors, config)
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for own_name, tensor in tensors.items():
        name = own_name
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if "~" in name:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        elif name == "text_projection":
            tensor = tensor.T
        elif re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name):
            tensor = tensor[:, :, None, None]  # convolutions of 1 x 1 there
        piece = re.search(r"#(\d)", name)
        pieces.setdefault(prefix + re.sub(r"#\d|~", "", name), {})[int(piece[1]) if piece else 0] = tensor
    return {name: torch.cat([found[i] for i in sorted(found)]) for name, found in pieces.items()}


def _unet(tensors: _Tensors, config: Any) -> tuple[str, _Rules]:
    """There blocks are counted through, with their samplers among them."""
    num_blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("down_blocks."))
    num_layers = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("down_blocks.0.resnets."))
    rules: _Rules = []
    for i in range(num_blocks):
        first, last = i * (num_layers + 1), i * (num_layers + 1) + num_layers
        for j in range(num_layers + 1):
            rules += [
                (rf"^down_blocks\.{i}\.resnets\.{j}\.", f"input_blocks.{first + j + 1}.0."),
                (rf"^down_blocks\.{i}\.attentions\.{j}\.", f"input_blocks.{first + j + 1}.1."),
                (rf"^up_blocks\.{i}\.resnets\.{j}\.", f"output_blocks.{first + j}.0."),
                (rf"^up_blocks\.{i}\.attentions\.{j}\.", f"output_blocks.{first + j}.1."),
            ]
        after = 2 if any(name.startswith(f"up_blocks.{i}.attentions.") for name in tensors) else 1
        rules += [
            (rf"^down_blocks\.{i}\.downsamplers\.0\.conv\.", f"input_blocks.{last + 1}.0.op."),
            (rf"^up_blocks\.{i}\.upsamplers\.0\.conv\.", f"output_blocks.{last}.{after}.conv."),
        ]
    resnet = r"^((?:input|output)_blocks\.\d+\.0|middle_block\.[02])\."
    return "model.diffusion_model.", [
        *rules,
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (rf"{resnet}norm1\.", r"\1.in_layers.0."),
        (rf"{resnet}conv1\.", r"\1.in_layers.2."),
        (rf"{resnet}norm2\.", r"\1.out_layers.0."),
        (rf"{resnet}conv2\.", r"\1.out_layers.3."),
        (r"\.time_emb_proj\.", ".emb_layers.1."),
        (r"\.conv_shortcut\.", ".skip_connection."),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    ]


def _vae(prefix: str) -> Callable[[_Tensors, Any], tuple[str, _Rules]]:
    def names(tensors: _Tensors, config: Any) -> tuple[str, _Rules]:
        last = max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
        rules: _Rules = []
        for i in range(last + 1):  # counted from the smallest images on, there from the largest
            rules += [
                (rf"^decoder\.up_blocks\.{i}\.resnets\.", f"decoder.up.{last - i}.block."),
                (rf"^decoder\.up_blocks\.{i}\.upsamplers\.0\.", f"decoder.up.{last - i}.upsample."),
            ]
        return prefix, [
            *rules,
            (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
            (r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
            (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
            (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
            (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
            (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
            (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
            (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
            (r"\.conv_shortcut\.", ".nin_shortcut."),
            (r"\.conv_norm_out\.", ".norm_out."),
        ]

    return names


# transformers dropped the first part of these names in version 5.6; `position_ids` are a constant.
_CLIP: _Rules = [(r"^(?!text_model\.|text_projection\.)", "text_model.")]
_OPEN_CLIP: _Rules = [
    *_CLIP,
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight", "text_projection"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.q_proj\.", ".attn.in_proj_#0"),
    (r"\.self_attn\.k_proj\.", ".attn.in_proj_#1"),
    (r"\.self_attn\.v_proj\.", ".attn.in_proj_#2"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
]


def _first_clip(tensors: _Tensors, config: Any) -> tuple[str, _Rules]:
    """Stable Diffusion 1 has the CLIP of OpenAI, and 2 that of OpenCLIP, which differ in their activation."""
    if config.hidden_act == "quick_gelu":
        return "cond_stage_model.transformer.", _CLIP
    return "cond_stage_model.model.", _OPEN_CLIP


def _sd3(tensors: _Tensors, config: Any) -> tuple[str, _Rules]:
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    return "model.diffusion_model.", [
        (r"^pos_embed\.pos_embed", "pos_embed"),
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1~."),
        (rf"^(transformer_blocks\.{last}\.norm1_context)\.linear\.", r"\1.linear~."),
        (r"^transformer_blocks\.(\d+)\.(\w+)_context\.", r"joint_blocks.\1.context_block.\2."),
        (r"^transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj\.", r"joint_blocks.\1.context_block.attn.to_\2."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.", r"joint_blocks.\1.context_block.attn.ln_\2."),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"joint_blocks.\1.context_block.attn.proj."),
        (r"^transformer_blocks\.", "joint_blocks."),
        (r"^(joint_blocks\.\d+)\.(?!context_block)", r"\1.x_block."),
        (r"\.norm1\.linear(~?)\.", r".adaLN_modulation.1\1."),
        (r"\.norm_([qk])\.", r".ln_\1."),
        (r"\.to_out\.0\.", ".proj."),
        (r"\.ff\.net\.0\.proj\.", ".mlp.fc1."),
        (r"\.ff\.net\.2\.", ".mlp.fc2."),
        *_QKV,
    ]


_QKV: _Rules = [(rf"\.to_{letter}\.", f".qkv#{i}.") for i, letter in enumerate("qkv")]

_FLUX: _Rules = [
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"_in\.linear_1\.", "_in.in_layer."),
    (r"_in\.linear_2\.", "_in.out_layer."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1~."),
    (r"^(single_transformer_blocks\.\d+)\.attn\.to_q\.", r"\1.linear1#0."),
    (r"^(single_transformer_blocks\.\d+)\.attn\.to_k\.", r"\1.linear1#1."),
    (r"^(single_transformer_blocks\.\d+)\.attn\.to_v\.", r"\1.linear1#2."),
    (r"^(single_transformer_blocks\.\d+)\.proj_mlp\.", r"\1.linear1#3."),
    (r"^(single_transformer_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
    (r"^(single_transformer_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.lin."),
    (r"^(single_transformer_blocks\.\d+)\.attn\.", r"\1."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"double_blocks.\1.img_mod.lin."),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.", r"double_blocks.\1.txt_mod.lin."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.", r"double_blocks.\1.img_mlp."),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.", r"double_blocks.\1.txt_mlp."),
    (r"_mlp\.0\.proj\.", "_mlp.0."),
    (r"^transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj\.", r"double_blocks.\1.txt_attn.to_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.", r"double_blocks.\1.txt_attn.norm_\2."),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_blocks.\1.txt_attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn\.", r"double_blocks.\1.img_attn."),
    (r"\.to_out\.0\.", ".proj."),
    (r"\.norm_q\.weight", ".norm.query_norm.scale"),
    (r"\.norm_k\.weight", ".norm.key_norm.scale"),
    *_QKV,
]


def _fixed(prefix: str, rules: _Rules | None = None) -> Callable[[_Tensors, Any], tuple[str, _Rules]]:
    return lambda tensors, config: (prefix, rules or [])


PIPELINES: dict[str, dict[str, Callable[[_Tensors, Any], tuple[str, _Rules]]]] = {
    "StableDiffusionPipeline": {
        "unet": _unet,
        "vae": _vae("first_stage_model."),
        "text_encoder": _first_clip,
    },
    "StableDiffusionXLPipeline": {
        "unet": _unet,
        "vae": _vae("first_stage_model."),
        "text_encoder": _fixed("conditioner.embedders.0.transformer.", _CLIP),
        "text_encoder_2": _fixed("conditioner.embedders.1.model.", _OPEN_CLIP),
    },
    "StableDiffusion3Pipeline": {
        "transformer": _sd3,
        "vae": _vae("first_stage_model."),
        "text_encoder": _fixed("text_encoders.clip_l.transformer.", _CLIP),
        "text_encoder_2": _fixed("text_encoders.clip_g.transformer.", _CLIP),
        "text_encoder_3": _fixed("text_encoders.t5xxl.transformer."),
    },
    "FluxPipeline": {
        "transformer": _fixed("model.diffusion_model.", _FLUX),
        "vae": _vae("vae."),
        "text_encoder": _fixed("text_encoders.clip_l.transformer.", _CLIP),
        "text_encoder_2": _fixed("text_encoders.t5xxl.transformer."),
    },
}
"""Pipeline class -> part -> prefix and rules, which depend on the names and, for text encoders, on the settings."""
