"""Models that come with both sides, such as CLIP: taken whole and as they are, to be compared with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lilt.registry import Registry, nearest
from lilt.towers.base import Inputs, Tokens, Tower, vision_towers
from lilt.towers.spec import TowerSpec


class Baseline(NamedTuple):
    """Both sides of a model, which give joint vectors of one width; its scale > 0, and its bias if it has one."""

    vision: Tower
    text: Tower
    scale: float
    bias: float | None


class JointSide(Tower):
    """One side of a model with two: it gives joint vectors (B, D), its own projection included."""

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        return Tokens(raw)

    def own(self, raw: Tensor, inputs: Inputs) -> Tensor:
        return raw


baselines: Registry[Callable[[TowerSpec], Baseline]] = Registry("baseline source")


def names_model(what: str) -> bool:
    """Say whether this is the spec of a model and not a folder."""
    return re.match(r"\w{2,}:", what) is not None and not Path(what).exists()  # C:\runs has one letter


def load_baseline(what: str) -> Baseline:
    """Load `open_clip:ARCH@TAG` or `hf:NAME_OR_FOLDER` with its own preprocessing, tokenizer, padding and projections.

    Options: `weights=FILE` and `pretrained=false`. Raises ValueError for a model without a text side.
    """
    spec = TowerSpec.parse(what)
    known = ", ".join(f"{name}:…" for name in baselines.names())
    if spec.source not in baselines:
        if spec.source in vision_towers:
            raise ValueError(
                f"{what!r} has no text side; expected a model of images and texts, such as {known}; give one, or train "
                "this tower with a text tower and give the run"
            )
        raise ValueError(
            f"unknown model {what!r}; expected the folder of a run, or one of {known}; correct the name."
            f"{nearest(spec.source, baselines.names())}"
        )
    spec.refuse_extra()
    for option in ("layers", "pool", "image_px", "roles"):
        if getattr(spec, option) is not None:
            raise ValueError(
                f"{what!r}: {option} would make another model of it; expected weights or pretrained, or nothing; leave "
                f"{option} out"
            )
    found = baselines[spec.source](spec)
    if found.vision.dim != found.text.dim:
        raise ValueError(
            f"{what!r} gives vectors of width {found.vision.dim} for images and {found.text.dim} for texts, which have "
            "no cosine; expected one joint space, as CLIP has; give such a model"
        )
    for tower in (found.vision, found.text):
        tower.spec = what
    return found
