"""A transformer block that is not part of any tower, from the library whose towers are made of it."""

from __future__ import annotations

from timm.models.vision_transformer import Block
from torch import nn


def pre_norm_block(width: int, heads: int, mlp_ratio: float, init_scale: float) -> nn.Module:
    """Return timm's pre-norm block with LayerScale init_scale on both branches and torch's own random weights.

    (B, L, width) -> (B, L, width); attn_mask is boolean, True where a token is seen, and broadcasts to (B, H, L, L).
    timm's rather than torch's own: that one has no LayerScale, and its kernel for evaluation leaves subclasses out.
    """
    return Block(width, heads, mlp_ratio, qkv_bias=True, init_values=init_scale)
