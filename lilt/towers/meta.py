"""Towers on the meta device: their shapes and costs without their weights, and at most a config downloaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForTextEncoding, ViTImageProcessor

from lilt.registry import Registry
from lilt.towers.base import Tower, text_towers, vision_towers
from lilt.towers.image_models import hf_contract
from lilt.towers.loading import fixed_seed, open_clip_model
from lilt.towers.published import config_of, find_published
from lilt.towers.spec import TowerSpec
from lilt.towers.text import from_hf_text, from_open_clip_text, with_declared_pool
from lilt.towers.vision import from_hf_vision


class NoTokenizer:
    """Stands in for a transformers tokenizer where only lengths count: every text is as long as it may be."""

    model_max_length = 8192
    pad_token = ""
    pad_token_id = pad_token_type_id = 0

    def __call__(self, texts: Sequence[str], max_length: int = 1, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * max_length for _ in texts], "attention_mask": [[1] * max_length for _ in texts]}


def on_meta(spec: TowerSpec, side: str) -> Tower:
    """Build the tower of a spec without weights on the meta device; the function of a `py:` spec is really called."""
    registry: Registry = vision_towers if side == "vision" else text_towers
    if spec.source == "py":
        return without_weights(registry["py"](spec))
    bare = replace(spec, pretrained=False, weights=None)
    with torch.device("meta"):
        if spec.source == "hf":
            return _hf_vision(bare) if side == "vision" else _hf_text(bare)
        if spec.source == "open_clip" and side == "text":
            return _open_clip_text(bare)
        return registry[spec.source](bare)


def without_weights(tower: Tower) -> Tower:
    """Return a copy of a tower on the meta device; tensors that several modules share stay one, unlike with `.to`."""
    # deepcopy takes what the memo holds instead of copying it
    memo: dict[int, Any] = {id(b): b.detach().to("meta") for b in tower.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in tower.parameters()}
    return copy.deepcopy(tower, memo | {id(tower.contract): tower.contract})


def _hf_vision(spec: TowerSpec) -> Tower:
    spec.refuse_extra()
    config = config_of(spec.name)
    with fixed_seed():
        body = AutoModel.from_config(config, dtype=torch.float32)
    body = getattr(body, "vision_model", body)
    label = f"hf:{spec.name}"
    return from_hf_vision(body, label, spec, hf_contract(_processor(spec.name, body.config), label, spec))


def _processor(name: str, config: Any) -> Any:
    """Return the image processor of a name, or where it cannot be had one that knows the image side."""
    known = find_published(name)
    if known is None and (not Path(name).is_dir() or (Path(name) / "preprocessor_config.json").is_file()):
        return AutoImageProcessor.from_pretrained(name, use_fast=True)
    px = known.image_px if known is not None else getattr(config, "image_size", None)
    side = px[0] if isinstance(px, Sequence) else px or 224
    return ViTImageProcessor(size={"height": side, "width": side})


def _hf_text(spec: TowerSpec) -> Tower:
    spec.refuse_extra()
    config = config_of(spec.name)
    factory: Any = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
    with fixed_seed():
        body = factory.from_config(config, dtype=torch.float32)
    body.tie_weights()  # transformers 5.0 leaves that out on meta
    return from_hf_text(body, f"hf:{spec.name}", with_declared_pool(spec), NoTokenizer())


def _open_clip_text(spec: TowerSpec) -> Tower:
    spec.refuse_extra()
    body = open_clip_model(replace(spec, image_px=None)).text

    def count(texts: Sequence[str], context_length: int = int(getattr(body, "context_length", 77))) -> Tensor:
        return torch.ones(len(texts), context_length, dtype=torch.long, device="cpu")

    return from_open_clip_text(body, spec, count)
