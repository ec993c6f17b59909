"""The shared encoder and the projection on top of two towers, checked against what the towers give."""

from __future__ import annotations

from typing import Any

import torch

from lilt.model.projection import Projection, build_projection, projections
from lilt.model.shared import SharedEncoder, build_shared, shared_encoders
from lilt.registry import parse_call
from lilt.towers.base import Encoded, Tokens, Tower
from lilt.towers.loading import fixed_seed


def build_heads(shared: str, projection: str, vision: Tower, text: Tower) -> tuple[SharedEncoder, Projection]:
    """Build a shared encoder and a projection from their specs; where one reads tokens, each tower runs on its example.

    Raises ValueError where a tower has not what they read: tokens, a class token, or one width for both.
    """
    kind = shared_encoders[parse_call(shared).name]
    towers = (vision, text)
    pooled = tokens = [tower.dim for tower in towers]
    found: list[Tokens] = []
    if kind.reads_tokens or projections[parse_call(projection).name].reads_tokens:
        found = [_tokens(tower) for tower in towers]
        tokens = [each.features.shape[-1] for each in found]
    encoder = build_shared(shared, *(tokens if kind.reads_tokens else pooled))
    for tower, each, width in zip(towers, found, pooled, strict=False):
        _check(encoder, tower, each, width)
    if encoder.width is not None:
        pooled = tokens = [encoder.width, encoder.width]
    return encoder, build_projection(projection, *pooled, *tokens)


def _check(encoder: SharedEncoder, tower: Tower, tokens: Tokens, width: int) -> None:
    if encoder.reads_tokens:
        if getattr(encoder, "pool", "") == "cls" and tokens.mask is None and not tokens.prefix:
            raise ValueError(
                f"shared: the {tower.side} tower {tower.spec!r} has no class token to read behind the shared blocks; "
                "expected one, or another pool; use shared=transformer(pool=mean)"
            )
    elif encoder.width is not None and tokens.features.shape[-1] != width:
        raise ValueError(
            f"shared: the {tower.side} tower {tower.spec!r} gives tokens of width {tokens.features.shape[-1]} and with "
            f"pool={tower.pool} features of width {width}; expected one width, as both go through the shared encoder; "
            "use another pool, shared=transformer, or a projection that reads no tokens"
        )


@torch.no_grad()
def _tokens(tower: Tower) -> Tokens:
    """Run a tower on its example as it will be evaluated; its modes and the random numbers stay as they are."""
    device = next(tower.parameters()).device
    inputs: Any = tower.example()
    inputs = inputs.to(device) if isinstance(inputs, torch.Tensor) else {k: v.to(device) for k, v in inputs.items()}
    modes = [(module, module.training) for module in tower.modules()]
    try:
        for module, _ in modes:
            module.training = False  # the flag alone: train() and eval() of a module may do more than that
        with fixed_seed():
            encoded: Encoded = tower.encode(inputs, tokens=True)
    finally:
        for module, mode in modes:
            module.training = mode
    assert encoded.tokens is not None
    return encoded.tokens
