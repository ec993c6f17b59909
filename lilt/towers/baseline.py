"""Models that come with both sides, such as CLIP: taken whole and as they are, to be compared with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lilt.registry import Registry, nearest
from lilt.towers.base import Inputs, Tokens, Tower, vision_towers
from lilt.towers.seam import Seam, find_seam, first_tensor
from lilt.towers.spec import TowerSpec
from lilt.towers.vision import prefix_tokens


class Baseline(NamedTuple):
    """Both sides of a model, which give joint vectors of one width; its scale > 0, and its bias if it has one."""

    vision: Tower
    text: Tower
    scale: float
    bias: float | None


class Said(NamedTuple):
    """What one side of a model gave: joint vectors (B, D), and what its seam gave, where it has one."""

    joint: Tensor
    tokens: Tensor | None


class JointSide(Tower):
    """One side of a model with two: it gives joint vectors (B, D), its own projection included.

    Its tokens are those in front of the projection. `lilt.towers.space` says whether that takes a single one of them.
    """

    seam: Seam | None = None
    prefix = 0

    def joint(self, inputs: Inputs) -> Tensor:
        """Return joint vectors (B, D), not normalised, as the library gives them."""
        raise NotImplementedError

    def run(self, inputs: Inputs) -> Said:
        if self.seam is None:
            return Said(self.joint(inputs), None)
        kept: list[Tensor | None] = []
        seam: nn.Module = self.body.get_submodule(self.seam.at)
        handle = seam.register_forward_hook(lambda _module, _args, output: kept.append(first_tensor(output)))
        try:
            joint = self.joint(inputs)
            return Said(joint, kept[-1])
        finally:
            handle.remove()

    def read(self, raw: Said, inputs: Inputs) -> Tokens:
        features = raw.tokens
        if features is None or self.seam is None:
            return Tokens(raw.joint)
        if features.ndim == 4:
            channels_first = features.shape[1] == self.seam.width
            return Tokens(features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2))
        if isinstance(inputs, Tensor) or "attention_mask" not in inputs:
            return Tokens(features, prefix=self.prefix)
        # CoCa's class token stands behind the text
        mask = inputs["attention_mask"].bool()
        return Tokens(features, F.pad(mask, (0, features.shape[1] - mask.shape[1]), value=True))

    def own(self, raw: Said, inputs: Inputs) -> Tensor:
        return raw.joint

    def finish(self, layers: int | None = None, roles: Mapping[str, str] | None = None) -> Tower:
        super().finish(layers, roles)
        self.seam = find_seam(self.body, lambda: self.joint(self.example()))
        self.prefix = prefix_tokens(self.body) if self.side == "vision" else 0
        return self


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
