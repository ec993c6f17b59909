"""Towers: any vision or text encoder behind one face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lilt import demo
from lilt.registry import Registry, nearest
from lilt.towers import baseline_hf, baseline_open_clip  # noqa: F401 (they register)
from lilt.towers.base import ImageContract, Inputs, Text, Tokenizer, Tokens, Tower, text_towers, vision_towers
from lilt.towers.baseline import Baseline, load_baseline, names_model
from lilt.towers.classifier import Classifier, classifiers
from lilt.towers.meta import on_meta
from lilt.towers.spec import TowerSpec, expand
from lilt.towers.text import wrap_text
from lilt.towers.vision import wrap_vision

# names for specs: ordinary towers in folders that come with the package
SHORT = {"vision": {"demo": f"timm:{demo.VISION}"}, "text": {"demo": f"hf:{demo.TEXT}"}}


def build_tower(
    what: str | nn.Module,
    side: str,
    contract: Any = None,
    image_px: int | None = None,
    roles: Mapping[str, str] | None = None,
) -> Tower:
    """Build the vision or text tower of a spec, or wrap a module with its preprocess or tokenizer.

    roles, a map as in `lilt.towers.roles`, says what the guess by type gets wrong; it counts before a file that the
    spec names and before what a `py:` function returns.
    """
    if isinstance(what, Tower):
        if roles is not None and roles != what.roles:
            raise ValueError(
                f"the finished {side} tower {what.spec!r} has the roles {what.roles}, not {roles}; expected the "
                "map it was built with; pass the module instead, or build the tower with these roles"
            )
        return what
    if isinstance(what, nn.Module):
        wrap = wrap_vision if side == "vision" else wrap_text
        spec = TowerSpec("module", image_px=image_px, roles=roles)
        return wrap(what, contract, f"module:{type(what).__name__}", spec)
    spec = _read_spec(what, side, image_px, roles)
    tower = _sources(side)[spec.source](spec)
    tower.spec = what
    return tower


def build_classifier(what: str, image_px: int | None = None) -> Classifier:
    """Build an image model with its own classifier from a vision tower's spec; pool and layers mean nothing to it."""
    head, question, query = what.partition("?")
    spec = TowerSpec.parse(SHORT["vision"].get(head, head) + question + query, image_px)
    if spec.source not in classifiers:
        raise ValueError(
            f"{what!r} has no classifier that lilt knows to build; expected one of "
            f"{', '.join(f'{k}:…' for k in classifiers.names())}; give such a model, or a task that takes features"
        )
    return classifiers[spec.source](spec)


def meta_tower(what: str, side: str, image_px: int | None = None) -> Tower:
    """Build the tower of a spec on the meta device: no weights are read, and at most a config is downloaded."""
    tower = on_meta(_read_spec(what, side, image_px), side)
    tower.spec = what
    return tower


def _sources(side: str) -> Registry[Callable[..., Tower]]:
    return vision_towers if side == "vision" else text_towers


def _read_spec(what: str, side: str, image_px: int | None, roles: Mapping[str, str] | None = None) -> TowerSpec:
    registry = _sources(side)
    head, question, query = what.partition("?")
    full = SHORT[side].get(head, head) + question + query
    spec = TowerSpec.parse(full, image_px if side == "vision" else None, roles)
    known = [*registry.names(), *SHORT[side]]
    if spec.source not in registry:
        raise ValueError(
            f"unknown {side} tower {what!r}; expected one of {', '.join(f'{k}:…' for k in registry.names())} or "
            f"{', '.join(SHORT[side])}.{nearest(spec.source, known)}"
        )
    return spec


__all__ = [
    "Baseline", "Classifier", "ImageContract", "Inputs", "Text", "Tokenizer", "Tokens", "Tower", "TowerSpec",
    "build_classifier", "build_tower", "classifiers", "expand", "load_baseline", "meta_tower", "names_model",
    "text_towers", "vision_towers",
]  # fmt: skip
