"""open_clip's models: CLIP, SigLIP, CoCa and their kin, with the library's own transform and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import is_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from lilt.registry import nearest
from lilt.towers.base import ImageContract, Inputs
from lilt.towers.baseline import Baseline, JointSide, baselines
from lilt.towers.loading import open_clip_model
from lilt.towers.spec import TowerSpec
from lilt.towers.tokenizer import Encoding


class OpenClipSide(JointSide):
    """One side of an open_clip model; CoCa's gives its tokens beside the joint vectors."""

    def run(self, inputs: Inputs) -> Tensor:
        said = self.body(inputs if isinstance(inputs, Tensor) else inputs["input_ids"])
        return said[0] if isinstance(said, tuple) else said


class OpenClipTokenizer:
    """open_clip's tokenizer: rows of ids as long as the context."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.context_tokens = int(call.context_length)
        self.pad_id = int(getattr(getattr(call, "tokenizer", None), "pad_token_id", 0) or 0)

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[list[Encoding], int]:
        """Return one encoding per text and how many were cut; the length is the model's own, whatever is asked."""
        rows = self.call(list(texts))
        # with place for one token more, a text that was cut has one more
        longer = self.call(list(texts), context_length=self.context_tokens + 1)
        cut = (longer != self.pad_id).sum(1) > (rows != self.pad_id).sum(1)
        return [{"input_ids": row} for row in rows.tolist()], int(cut.sum())

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        """Stack; all rows have one length."""
        return {"input_ids": torch.tensor([e["input_ids"] for e in encodings], dtype=torch.long)}

    def describe(self) -> dict[str, Any]:
        """Return class and context length."""
        return {"class": type(self.call).__name__, "context_tokens": self.context_tokens}


@baselines.register("open_clip")
def open_clip_baseline(spec: TowerSpec) -> Baseline:
    """Load `open_clip:ARCH@TAG`, `open_clip:hf-hub:NAME` or a folder saved by open_clip."""
    _check_names(spec)
    # a file of weights comes in place of those of a tag
    model = open_clip_model(replace(spec, pretrained=spec.pretrained or spec.weights is not None)).eval()
    arch = spec.name.partition("@")[0]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{arch}" if Path(arch).is_dir() else arch)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    label = f"open_clip:{spec.name}"
    vision = OpenClipSide(model.visual, "vision", label, None, ImageContract(0, transform=transform))
    text = OpenClipSide(model.text, "text", label, None, OpenClipTokenizer(tokenizer))
    bias = None if model.logit_bias is None else model.logit_bias.item()
    return Baseline(vision.finish(), text.finish(), model.logit_scale.exp().item(), bias)


def _check_names(spec: TowerSpec) -> None:
    """Raise for an unknown architecture or tag; without weights, a comparison would be with random numbers."""
    arch, _, tag = spec.name.partition("@")
    if Path(arch).is_dir() or ":" in arch:
        return  # brings its weights
    if (arch := arch.replace("/", "-")) not in (known := open_clip.list_models()):
        raise ValueError(
            f"open_clip has no model {arch!r}; expected one of open_clip.list_models() or a folder saved by open_clip; "
            f"correct the name.{nearest(arch, known)}"
        )
    if spec.pretrained and spec.weights is None and not is_pretrained_cfg(arch, tag) and not Path(tag).is_file():
        tags = open_clip.list_pretrained_tags_by_model(arch)
        what = f"has no weights {tag!r}" if tag else "names no weights"
        raise ValueError(
            f"open_clip:{spec.name} {what}; expected open_clip:{arch}@TAG with one of {', '.join(tags) or 'no tags'}; "
            f"give one, or ?weights=FILE, or ?pretrained=false for random weights.{nearest(tag, tags)}"
        )
