"""A real vision tower whose time is known: it rests for each image, so that a busy machine changes little."""

from __future__ import annotations

import time

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lilt.towers import ImageContract

REST = 0.02  # seconds an image


def rest(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    time.sleep(REST * len(inputs[0]))


def vision() -> tuple[VisionTransformer, ImageContract]:
    """The factory of a `py:` spec: a ViT of width 32 and depth 2 for 32 px."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    net.register_forward_pre_hook(rest)
    return net, ImageContract(image_px=32)
