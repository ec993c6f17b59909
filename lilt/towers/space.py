"""Where a tower's pooled features come from: one of its tokens or the mean of them, and a norm that may lie between."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.towers.base import Inputs, Tokens, Tower, pool_tokens

PICKS = ("cls", "mean", "token")
TEXTS = ("a photo of a red boat", "two")


class Space(NamedTuple):
    """What a tower pools by (cls, mean, cls+mean, token), and the norm that its tokens lack to be as what it pools."""

    how: str
    norm: nn.Module | None = None

    def bring(self, tokens: Tokens) -> Tokens:
        """Return tokens as what reads the pooled features knows them: behind that norm, in their width.

        Where the class token and the mean stand side by side, the class token stands beside each token.
        """
        features = tokens.features if self.norm is None else _normed(self.norm, tokens.features)
        if self.how == "cls+mean":
            features = torch.cat([features[:, :1].expand_as(features), features], dim=-1)
        return tokens._replace(features=features)


@torch.no_grad()
def find_space(tower: Tower) -> Space:
    """Find out by running a tower in which way its pooled features are made of its tokens.

    Raises ValueError where what reads the pooled features knows no token: there are none, or an attention pools them.
    """
    inputs = _some(tower)
    training = tower.training
    tower.eval()
    try:
        raw = tower.run(inputs)
        tokens = tower.read(raw, inputs)
        if tokens.features.ndim != 3:
            raise _refusal(tower, "gives one vector for each input and no tokens")
        if tower.pool != "own":
            return Space(tower.pool)
        found = _match(tower, tokens, raw, tower.own(raw, inputs))
    finally:
        tower.train(training)
    if found is None:
        raise _refusal(tower, "pools its tokens in another way than by one of them or their mean")
    return found


def _match(tower: Tower, tokens: Tokens, raw: object, pooled: Tensor) -> Space | None:
    width = tokens.features.shape[-1]
    outside = (leaf for leaf in tower.anatomy.leaves if leaf.role == "norm" and leaf.block is None)
    modules = [tower.body.get_submodule(leaf.path) for leaf in outside]
    norms = [module for module in modules if _width(module) == width]
    before = tokens._replace(features=raw) if isinstance(raw, Tensor) and raw.shape == tokens.features.shape else None
    for how in PICKS:
        if how == "cls" and tokens.mask is None and not tokens.prefix:
            continue
        picked = pool_tokens(tokens, how)
        if _same(picked, pooled):
            return Space(how)
        for norm in norms:
            if _same(_normed(norm, picked), pooled):
                return Space(how, norm)
            # the mean was taken before the norm, and the tokens were read behind it
            if before is not None and _same(_normed(norm, pool_tokens(before, how)), pooled):
                return Space(how) if _same(_normed(norm, before.features), tokens.features) else Space(how, norm)
    return None


def _normed(norm: nn.Module, features: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        # timm's for images wants them as (B, C, H, W)
        return F.layer_norm(features, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    normed: Tensor = norm(features)
    return normed


def _width(norm: nn.Module) -> int:
    return max((parameter.numel() for parameter in norm.parameters(recurse=False)), default=0)


def _same(found: Tensor, expected: Tensor) -> bool:
    spread = float(expected.abs().mean())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * spread)


def _some(tower: Tower) -> Inputs:
    """Return two inputs that differ in every place; zeros would hide what a mean is of."""
    device = next(tower.parameters()).device
    example = tower.example()
    if isinstance(example, Tensor):
        noise = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0))
        return noise.to(device)
    encodings, _ = tower.contract.encode(TEXTS)  # type: ignore[union-attr]
    return {name: value.to(device) for name, value in tower.contract.pad(encodings).items()}  # type: ignore[union-attr]


def _refusal(tower: Tower, why: str) -> ValueError:
    return ValueError(
        f"the {tower.side} tower {tower.spec!r} {why} (pool={tower.pool}), so what follows it takes no single token; "
        "expected a tower that pools by one token or the mean; train with ?pool=cls or ?pool=mean, or compare pooled "
        "vectors (score=cosine)"
    )
