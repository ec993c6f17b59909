"""Pairs of tiny towers under every shared encoder and every projection."""

from __future__ import annotations

import torch
from torch import Tensor

from lilt.model import Scale, TwoTower, build_heads
from lilt.policies import apply, parse_policy, plan
from lilt.towers import Tower
from lilt.towers.base import Encoded, Tokens
from tests.towers.families import VIT, timm_tower, tiny

# by registered name: its default and what takes another path through the code
SHARED = {
    "none": ("none",),
    "mlp": ("mlp", "mlp(mlp_ratio=2,types=true,points=2)"),
    "transformer": ("transformer(heads=4)", "transformer(n=2,types=true,points=2)", "transformer(pool=mean,points=2)"),
}
HEADS = {
    "linear": ("linear(dim=16)",),
    "mlp": ("mlp(dim=16)",),
    "glu": ("glu(dim=16,expansion=2)",),
    "tokens": ("tokens(dim=16)", "tokens(dim=16,tied=true)"),
    "none": ("none",),
}
PAIRS = [(s, p) for shared in SHARED.values() for heads in HEADS.values() for s in shared for p in heads]


def wide() -> Tower:
    """A vision tower of width 48, wider than the tiny text towers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return timm_tower("vit_tiny_patch16_224", **(VIT | {"embed_dim": 48})).eval()


def joined(shared: str, projection: str, vision: Tower, text: Tower, policy: str = "layernorm") -> TwoTower:
    """Two towers with a policy under heads, in eval mode."""
    for tower in (vision, text):
        apply(plan(parse_policy(policy, tower.side), tower), tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, head = build_heads(shared, projection, vision, text)
    return TwoTower(vision, text, head, Scale(), encoder).eval()


def pair(shared: str, projection: str) -> TwoTower:
    """A tiny ViT and a tiny BERT; of two widths, but where nothing bridges them."""
    return joined(shared, projection, tiny("vit") if (shared, projection) == ("none", "none") else wide(), tiny("bert"))


def words(width: int, lengths: tuple[int, ...] = (3, 5, 2), dtype: torch.dtype = torch.float32) -> Encoded:
    """Random tokens of captions of several lengths, with noise where they are padded."""
    features = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(5)).to(dtype)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return Encoded(features[:, 0], Tokens(features, mask))


def patches(width: int, prefix: int = 1, dtype: torch.dtype = torch.float32) -> Encoded:
    """Random tokens of two images behind class and register tokens."""
    features: Tensor = torch.randn(2, prefix + 4, width, generator=torch.Generator().manual_seed(6)).to(dtype)
    return Encoded(features[:, 0], Tokens(features, prefix=prefix))
