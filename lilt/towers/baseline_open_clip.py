"""open_clip's models: CLIP, SigLIP, CoCa and their kin, with the library's own transform and tokenizer."""

from __future__ import annotations

from pathlib import Path

import open_clip
from open_clip.pretrained import is_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from lilt.registry import nearest
from lilt.towers.base import ImageContract, Inputs
from lilt.towers.baseline import Baseline, JointSide, baselines
from lilt.towers.loading import open_clip_model
from lilt.towers.spec import TowerSpec
from lilt.towers.tokenizer import fixed_tokenizer


class OpenClipSide(JointSide):
    """One side of an open_clip model; CoCa's gives its tokens beside the joint vectors."""

    def joint(self, inputs: Inputs) -> Tensor:
        said = self.body(inputs if isinstance(inputs, Tensor) else inputs["input_ids"])
        return said[0] if isinstance(said, tuple) else said


@baselines.register("open_clip")
def open_clip_baseline(spec: TowerSpec) -> Baseline:
    """Load `open_clip:ARCH@TAG`, `open_clip:hf-hub:NAME` or a folder saved by open_clip."""
    _check_names(spec)
    model = open_clip_model(spec).eval()
    arch = spec.name.partition("@")[0]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{arch}" if Path(arch).is_dir() else arch)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    label = f"open_clip:{spec.name}"
    vision = OpenClipSide(model.visual, "vision", label, None, ImageContract(0, transform=transform))
    text = OpenClipSide(model.text, "text", label, None, fixed_tokenizer(tokenizer, tokenizer.context_length))
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
