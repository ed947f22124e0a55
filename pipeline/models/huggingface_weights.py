"""Weights of vision transformers in the format of Hugging Face's transformers, renamed to those of timm."""

import re

import torch
from torch import Tensor

MARK = "embeddings.patch_embeddings.projection.weight"  # what every such file has, and none of timm's
PREFIX = re.compile(r"^(vit|dinov2)\.")  # of a network with a classifier
# In the order in which they are applied. DINOv2: Oquab et al. 2023, arXiv:2304.07193; ViT: Dosovitskiy et al. 2020,
# arXiv:2010.11929.
NAMES = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
]


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' `Dinov2Model` or `ViTModel` to those of timm's `VisionTransformer`.

    Query, key and value are joined into one layer. Other weights are returned as they are, and so is what a backbone
    does not need, as the mask token.
    """
    plain = {PREFIX.sub("", name): value for name, value in state.items()}
    return {_timm_name(name): value for name, value in _join_qkv(plain).items()} if MARK in plain else state


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, value in state.items():
        layer, part, kind = name.partition(".attention.attention.query.")
        names = [f"{layer}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
        if part and state.keys() >= set(names):
            joined[f"{layer}.attn.qkv.{kind}"] = torch.cat([state[one] for one in names])
        else:
            joined[name] = value
    return joined


def _timm_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name
