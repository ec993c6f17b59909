"""Towers: any vision or text encoder behind one face."""

from __future__ import annotations

from typing import Any

from torch import nn

from lilt import demo
from lilt.registry import Registry, nearest
from lilt.towers.base import ImageContract, Inputs, Tokenizer, Tokens, Tower, text_towers, vision_towers
from lilt.towers.spec import TowerSpec, expand
from lilt.towers.text import wrap_text
from lilt.towers.vision import wrap_vision

# names for specs: ordinary towers in folders that come with the package
SHORT = {"vision": {"demo": f"timm:{demo.VISION}"}, "text": {"demo": f"hf:{demo.TEXT}"}}


def build_tower(what: str | nn.Module, side: str, contract: Any = None, image_px: int | None = None) -> Tower:
    """Build the vision or text tower of a spec, or wrap a module with its preprocess or tokenizer."""
    registry: Registry = vision_towers if side == "vision" else text_towers
    if isinstance(what, Tower):
        return what
    if isinstance(what, nn.Module):
        wrap = wrap_vision if side == "vision" else wrap_text
        return wrap(what, contract, f"module:{type(what).__name__}", TowerSpec("module", image_px=image_px))
    head, question, query = what.partition("?")
    full = SHORT[side].get(head, head) + question + query
    spec = TowerSpec.parse(full, image_px=image_px if side == "vision" else None)
    known = [*registry.names(), *SHORT[side]]
    if spec.source not in registry:
        raise ValueError(
            f"unknown {side} tower {what!r}; expected one of {', '.join(f'{k}:…' for k in registry.names())} or "
            f"{', '.join(SHORT[side])}.{nearest(spec.source, known)}"
        )
    tower = registry[spec.source](spec)
    tower.spec = what
    return tower


__all__ = [
    "ImageContract", "Inputs", "Tokenizer", "Tokens", "Tower", "TowerSpec", "build_tower", "expand", "text_towers",
    "vision_towers",
]  # fmt: skip
