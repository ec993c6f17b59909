"""Vision towers from timm, transformers, open_clip, or your own module."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from lilt.towers.base import ImageContract, Inputs, Tokens, Tower, vision_towers
from lilt.towers.image_models import given_contract, hf_contract, timm_contract, timm_model
from lilt.towers.loading import fixed_seed, load_weights, open_clip_model, py_factory, quiet
from lilt.towers.spec import TowerSpec


class TimmVision(Tower):
    """A timm model without its classifier."""

    def run(self, inputs: Inputs) -> Tensor:
        return self.body.forward_features(inputs)

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        if raw.ndim == 4:
            # convolutional nets give (B, C, H, W), Swin (B, H, W, C); timm says which
            channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
            return Tokens(raw.flatten(1, 2) if channels_last else raw.flatten(2).transpose(1, 2))
        features = self.body.fc_norm(raw) if hasattr(self.body, "fc_norm") else raw
        return Tokens(features, prefix=getattr(self.body, "num_prefix_tokens", 0))

    def own(self, raw: Tensor, inputs: Inputs) -> Tensor:
        return self.body.forward_head(raw, pre_logits=True)


class HfVision(Tower):
    """A transformers vision model, or the vision side of a dual one."""

    def run(self, inputs: Inputs) -> Any:
        takes = inspect.signature(self.body.forward).parameters
        more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        return self.body(pixel_values=inputs, **more)

    def read(self, raw: Any, inputs: Inputs) -> Tokens:
        hidden = raw.last_hidden_state
        if hidden.ndim == 4:
            return Tokens(hidden.flatten(2).transpose(1, 2))
        return Tokens(hidden, prefix=prefix_tokens(self.body))

    def own(self, raw: Any, inputs: Inputs) -> Tensor:
        pooled = getattr(raw, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        tokens = self.read(raw, inputs)
        return tokens.features[:, 0] if tokens.prefix else tokens.features.mean(1)


def prefix_tokens(body: nn.Module) -> int:
    """Return how many tokens of a vision model lead without content, by what it is made of: class token, registers."""
    told: list[Any] = [module.num_prefix_tokens for module in body.modules() if hasattr(module, "num_prefix_tokens")]
    if told:  # timm's, which may be a part of it
        return int(told[0])
    if not any(name.endswith(("cls_token", "class_embedding")) for name, _ in body.named_parameters()):
        return 0
    configs = (getattr(module, "config", None) for module in body.modules())
    return 1 + max(getattr(config, "num_register_tokens", 0) or 0 for config in configs)


class OpenClipVision(Tower):
    """The vision side of an open_clip model; `own` keeps its projection, the other pools leave it out."""

    def run(self, inputs: Inputs) -> Any:
        if self.pool == "own":
            return self.body(inputs)
        if hasattr(self.body, "trunk"):
            return self.body.trunk.forward_features(inputs)
        out = self.body.forward_intermediates(
            inputs, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
        )
        return torch.cat([out["image_intermediates_prefix"][-1], out["image_intermediates"][-1]], dim=1)

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        if raw.ndim == 4:
            return Tokens(raw.flatten(2).transpose(1, 2))
        trunk = getattr(self.body, "trunk", None)
        return Tokens(raw, prefix=1 if trunk is None else getattr(trunk, "num_prefix_tokens", 0))

    def own(self, raw: Tensor, inputs: Inputs) -> Tensor:
        return raw


class OwnVision(Tower):
    """Somebody's own module: image batch -> (B, W), (B, L, W), or an output with last_hidden_state."""

    def run(self, inputs: Inputs) -> Any:
        raw = self.body(inputs)
        return getattr(raw, "last_hidden_state", raw)

    def read(self, raw: Tensor, inputs: Inputs) -> Tokens:
        return Tokens(raw.flatten(2).transpose(1, 2) if raw.ndim == 4 else raw)

    def own(self, raw: Tensor, inputs: Inputs) -> Tensor:
        return raw if raw.ndim == 2 else self.read(raw, inputs).features.mean(1)


@vision_towers.register("timm")
def timm_vision(spec: TowerSpec) -> Tower:
    """Build `timm:NAME` (registry name, hf-hub:…, or a folder saved by timm); other options go to `create_model`."""
    return from_timm(timm_model(spec, num_classes=0), f"timm:{spec.name}", spec)


def from_timm(body: nn.Module, label: str, spec: TowerSpec, contract: ImageContract | None = None) -> Tower:
    """Wrap a finished timm model: drop the classifier and, when another pool is asked for, its pooling."""
    contract = contract or timm_contract(body, spec)
    reset: Any = body.reset_classifier
    reset(0)
    if spec.pool not in (None, "own") and getattr(body, "attn_pool", None) is not None:
        reset(0, "")  # removes the attention pooling that nobody will read
    return TimmVision(body, "vision", label, spec.pool, contract).finish(spec.layers, spec.roles)


@vision_towers.register("hf")
def hf_vision(spec: TowerSpec) -> Tower:
    """Build `hf:NAME_OR_PATH` with transformers."""
    spec.refuse_extra()
    try:
        with fixed_seed(), quiet():
            if spec.pretrained and spec.weights is None:
                body = AutoModel.from_pretrained(spec.name, dtype=torch.float32)
            else:
                body = AutoModel.from_config(AutoConfig.from_pretrained(spec.name), dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(spec.name, use_fast=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers could not load the vision tower {spec.name!r}: {error}. Expected a hub name or a folder "
            "with config.json, weights and preprocessor_config.json"
        ) from error
    label = f"hf:{spec.name}"
    return from_hf_vision(getattr(body, "vision_model", body), label, spec, hf_contract(processor, label, spec))


def from_hf_vision(body: Any, label: str, spec: TowerSpec, contract: ImageContract) -> Tower:
    """Wrap a transformers vision model; a tanh pooler, trained for another task or not at all, is dropped."""
    pooler = getattr(body, "pooler", None)
    if pooler is not None and any(isinstance(m, nn.Linear) for m in pooler.modules()):
        body.pooler = None
    if spec.weights is not None:
        load_weights(body, spec.weights)
    return HfVision(body, "vision", label, spec.pool, contract).finish(spec.layers, spec.roles)


@vision_towers.register("open_clip")
def open_clip_vision(spec: TowerSpec) -> Tower:
    """Build the vision side of `open_clip:ARCH@TAG`."""
    spec.refuse_extra()
    body = open_clip_model(spec).visual
    if spec.pool not in (None, "own") and getattr(body, "proj", None) is not None:
        body.proj = None
    size = body.image_size[0] if isinstance(body.image_size, tuple) else body.image_size
    prep = body.preprocess_cfg
    contract = ImageContract(size, tuple(prep["mean"]), tuple(prep["std"]), prep.get("interpolation", "bicubic"))
    tower = OpenClipVision(body, "vision", f"open_clip:{spec.name}", spec.pool, contract)
    return tower.finish(spec.layers, spec.roles)


@vision_towers.register("py")
def py_vision(spec: TowerSpec) -> Tower:
    """Build `py:package.module:function`; the function returns a module, its preprocess and, if needed, a role map."""
    module, contract, spec = py_factory(spec)
    return wrap_vision(module, contract, f"py:{spec.name}", spec)


def wrap_vision(module: nn.Module, preprocess: Any, label: str, spec: TowerSpec) -> Tower:
    """Wrap a finished module; what it is decides how it is run, and preprocess is needed where it says nothing."""
    contract = given_contract(preprocess, label, spec)
    if hasattr(module, "forward_features") and hasattr(module, "pretrained_cfg"):
        return from_timm(module, label, spec, contract)
    if isinstance(module, PreTrainedModel):
        if contract is None:
            processor = AutoImageProcessor.from_pretrained(module.config.name_or_path, use_fast=True)
            contract = hf_contract(processor, label, spec)
        return from_hf_vision(module, label, spec, contract)
    if contract is None:
        raise ValueError(
            f"the module {type(module).__name__} came without a preprocess; a vision tower needs its own: pass "
            "preprocess=callable (PIL image -> tensor) or lilt.ImageContract(image_px=…, mean=…, std=…)"
        )
    if load := spec.weights:
        load_weights(module, load)
    return OwnVision(module, "vision", label, spec.pool, contract).finish(spec.layers, spec.roles)
