"""Where a tower's pooled features come from: one of its tokens or the mean of them, and what may lie between."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lilt.towers.base import Inputs, Tokens, Tower, pool_tokens
from lilt.towers.baseline import JointSide

PICKS = ("cls", "mean", "token")
TEXTS = ("a photo of a red boat", "two")


class Space(NamedTuple):
    """What a tower pools by (cls, mean, cls+mean, token), and what its tokens lack to be as what it gives.

    That is a norm, and of a model with both sides the rest up to the joint space.
    """

    how: str
    norm: nn.Module | None = None
    rest: tuple[nn.Module | nn.Parameter, ...] = ()

    def through(self, features: Tensor) -> Tensor:
        """Take features (…, W) through that norm and that rest."""
        if self.norm is not None:
            features = _normed(self.norm, features)
        for step in self.rest:
            # as rows, which is what the library calls its modules with: a BatchNorm takes nothing else
            rows = features.flatten(0, -2)
            rows = rows @ step if isinstance(step, nn.Parameter) else step(rows)
            features = rows.unflatten(0, features.shape[:-1])
        return features

    def bring(self, tokens: Tokens) -> Tokens:
        """Return tokens as what reads the pooled features knows them: in their place and in their width.

        Where the class token and the mean stand side by side, the class token stands beside each token.
        """
        features = self.through(tokens.features)
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
        if tower.side == "text" and tokens.mask is None:
            raise _refusal(tower, "has a tokenizer that does not say which tokens are padding")
        pooled = tower.own(raw, inputs)
        found = _match(tower, tokens, raw, pooled)
        if found is None and tokens.mask is not None and _match(tower, tokens._replace(mask=None), raw, pooled):
            raise _refusal(tower, "pools by padding too, which is none of the text")
    finally:
        tower.train(training)
    if found is None:
        raise _refusal(tower, "pools its tokens in another way than by one of them or their mean, such as by attention")
    return found


def _match(tower: Tower, tokens: Tokens, raw: object, pooled: Tensor) -> Space | None:
    width = tokens.features.shape[-1]
    outside = (leaf for leaf in tower.anatomy.leaves if leaf.role == "norm" and leaf.block is None)
    modules = [tower.body.get_submodule(leaf.path) for leaf in outside]
    norms = [module for module in modules if _width(module) == width]
    rest = tower.seam.steps(tower.body) if isinstance(tower, JointSide) and tower.seam is not None else ()
    before = tokens._replace(features=raw) if isinstance(raw, Tensor) and raw.shape == tokens.features.shape else None
    for how in PICKS:
        if how == "cls" and tokens.mask is None and not tokens.prefix:
            continue
        for norm in (None, *norms):
            space = Space(how, norm, rest)
            if _pools(space, tokens, pooled):
                return space
            # the mean was taken before the norm, and the tokens were read behind it
            if norm is not None and before is not None and _same(_normed(norm, pool_tokens(before, how)), pooled):
                return Space(how) if _same(_normed(norm, before.features), tokens.features) else Space(how, norm)
    return None


def _pools(space: Space, tokens: Tokens, pooled: Tensor) -> bool:
    """Say whether a tower pools so; the one token is the last, or that with the highest number, or another."""
    if space.how != "token":
        return _same(space.through(pool_tokens(tokens, space.how)), pooled)
    features, mask, prefix = tokens
    brought = space.through(features[:, prefix:])
    if brought[:, 0].shape != pooled.shape:
        return False
    hits = torch.stack([_rows_same(one, pooled) for one in brought.unbind(1)], dim=1)
    return bool((hits if mask is None else hits & mask[:, prefix:]).any(1).all())


def _normed(norm: nn.Module, features: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        # timm's for images wants them as (B, C, H, W)
        return F.layer_norm(features, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    normed: Tensor = norm(features)
    return normed


def _width(norm: nn.Module) -> int:
    return max((parameter.numel() for parameter in norm.parameters(recurse=False)), default=0)


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(_rows_same(found, expected).all())


def _rows_same(found: Tensor, expected: Tensor) -> Tensor:
    spread = float(expected.abs().mean())
    return torch.isclose(found, expected, rtol=1e-3, atol=1e-3 * spread).flatten(1).all(1)


def _some(tower: Tower) -> Inputs:
    """Return two inputs that differ in every place; zeros would hide what a mean is of."""
    device = next(tower.parameters()).device
    if tower.side == "text":
        encodings, _ = tower.contract.encode(TEXTS)  # type: ignore[union-attr]
        return {name: value.to(device) for name, value in tower.contract.pad(encodings).items()}  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    transform = getattr(tower.contract, "transform", None)
    if transform is None:
        return torch.randn(2, *tower.example().shape[1:], generator=generator).to(device)  # type: ignore[union-attr]
    noise = torch.randint(256, (2, 64 * 64 * 3), generator=generator, dtype=torch.uint8)
    return torch.stack([transform(Image.frombytes("RGB", (64, 64), bytes(row))) for row in noise.tolist()]).to(device)


def _refusal(tower: Tower, why: str) -> ValueError:
    if isinstance(tower, JointSide):
        return ValueError(
            f"the {tower.side} side of {tower.spec!r} {why}, so its way into the joint space takes no single token; "
            "expected a model whose sides pool by one token or the mean, as CLIP's do; give such a model, or compare "
            "pooled vectors (score=cosine)"
        )
    return ValueError(
        f"the {tower.side} tower {tower.spec!r} {why} (pool={tower.pool}), so what follows it takes no single token; "
        "expected a tower that pools by one token or the mean; train with ?pool=cls or ?pool=mean, or compare pooled "
        "vectors (score=cosine)"
    )
