"""Image models of the libraries as they come, and how they say they want their images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from torch import nn

from lilt.towers.base import ImageContract
from lilt.towers.loading import fill, fixed_seed, read_weights
from lilt.towers.spec import TowerSpec


def timm_model(spec: TowerSpec, **fixed: Any) -> nn.Module:
    """Build the timm model of a spec, with the weights of its file where it names one."""
    name = f"local-dir:{spec.name}" if Path(spec.name).is_dir() else spec.name
    options: dict[str, Any] = {key: _literal(value) for key, value in spec.extra.items()} | fixed
    pretrained = spec.pretrained and spec.weights is None
    if not pretrained:
        options["pretrained_cfg_overlay"] = {"hf_hub_id": None, "url": ""}
    sized: dict[str, Any] = {"img_size": spec.image_px} if spec.image_px else {}
    try:
        with fixed_seed():
            try:
                body = timm.create_model(name, pretrained=pretrained, **options, **sized)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                body = timm.create_model(name, pretrained=pretrained, **options)  # takes any size
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm could not build {spec.name!r}: {error}. Expected a name of timm.list_models(), hf-hub:NAME or a "
            "folder saved by timm, and options that its model takes"
        ) from error
    if spec.weights is not None:
        state = read_weights(spec.weights)
        # the model's own converter of foreign names; it resamples position embeddings too
        convert = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
        fill(body, convert(state, body) if convert else state, spec.weights)
    return body


def timm_contract(body: nn.Module, spec: TowerSpec) -> ImageContract:
    """Return how a timm model wants its images."""
    data = resolve_model_data_config(body)
    # a model built at another size than it was pretrained at says so in its patch embedding
    built = getattr(getattr(body, "patch_embed", None), "img_size", None)
    px = spec.image_px or (built[0] if built else data["input_size"][-1])
    return ImageContract(px, data["mean"], data["std"], data["interpolation"], data["crop_pct"])


def given_contract(preprocess: Any, label: str, spec: TowerSpec) -> ImageContract | None:
    """Return what a user passed, a description, a transformers processor or a callable, as a contract."""
    if preprocess is None or isinstance(preprocess, ImageContract):
        return preprocess
    if hasattr(preprocess, "image_mean") and hasattr(preprocess, "size"):
        return hf_contract(preprocess, label, spec)
    return ImageContract(0, transform=preprocess)


def hf_contract(processor: Any, label: str, spec: TowerSpec) -> ImageContract:
    """Return how a transformers image processor prepares its images."""
    shortest = _side(processor.size, "shortest_edge")
    px = spec.image_px or _side(processor.size, "height") or shortest
    if not px:
        raise ValueError(f"{label}: the image processor says no size ({processor.size}); give it one: ?image_px=224")
    cropped = (
        _side(getattr(processor, "crop_size", None), "height") if getattr(processor, "do_center_crop", False) else None
    )
    crop = cropped / shortest if cropped and shortest else 1.0
    if (share := getattr(processor, "crop_pct", None)) and shortest and shortest < 384:
        crop = share  # ConvNeXt's own rule: crop below 384 px, warp above
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    normalise = getattr(processor, "do_normalize", True)
    mean = tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0)
    if spec.image_px is None and cropped and crop < 1.0:
        px = cropped
    return ImageContract(int(px), mean, std, names.get(int(processor.resample), "bicubic"), min(crop, 1.0))


def _side(size: Any, name: str) -> int | None:
    """Read one side of a processor's size, which is a dict in transformers 5.0 and an object later."""
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _literal(value: str) -> Any:
    """Read a query value as a number or truth value where it is one."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
