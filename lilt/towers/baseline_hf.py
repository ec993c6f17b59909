"""Transformers' models of images and texts: whatever gives `get_image_features` and `get_text_features`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from lilt.towers.base import ImageContract, Inputs
from lilt.towers.baseline import Baseline, JointSide, baselines
from lilt.towers.calls import trace
from lilt.towers.loading import fixed_seed, load_weights, quiet
from lilt.towers.spec import TowerSpec
from lilt.towers.tokenizer import Encoding, HfTokenizer

BESIDE = 3  # columns that go along with patches of the image's own shape: real or padding, height, width


class HfSide(JointSide):
    """One side of a transformers model; of one that projects every token (FLAVA) the class token's vector."""

    def joint(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, Tensor):
            said = self.body.get_image_features(**_unpacked(inputs))
        else:
            takes = inspect.signature(self.body.get_text_features).parameters
            said = self.body.get_text_features(**{name: value for name, value in inputs.items() if name in takes})
        joint: Tensor = getattr(said, "pooler_output", said)
        return joint[:, 0] if joint.ndim == 3 else joint


@dataclass(frozen=True)
class HfPreprocess:
    """A transformers image processor: a picture -> (3, H, W), or patches (P, W + 3) where these keep its shape."""

    processor: Any

    def __call__(self, picture: Image.Image) -> Tensor:
        given = self.processor(images=picture, return_tensors="pt")
        pixels: Tensor = given["pixel_values"][0]
        if "spatial_shapes" not in given:
            return pixels
        shape = given["spatial_shapes"][0].to(pixels.dtype).expand(len(pixels), 2)
        return torch.cat([pixels, given["pixel_attention_mask"][0].to(pixels.dtype).unsqueeze(1), shape], dim=1)


def _unpacked(images: Tensor) -> dict[str, Tensor]:
    if images.ndim == 4:
        return {"pixel_values": images}
    pixels, beside = images.split([images.shape[-1] - BESIDE, BESIDE], dim=-1)
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": beside[..., 0].long(),
        "spatial_shapes": beside[:, 0, 1:].long(),
    }


class LibraryTokenizer(HfTokenizer):
    """A transformers tokenizer that pads as it does itself: on its own side, to the longest or to the whole context."""

    padding = "longest"

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        options: dict[str, Any] = {"max_length": self.context_tokens, "return_tensors": "pt", "verbose": False}
        return dict(self.tokenizer.pad(list(encodings), padding=self.padding, **options))


@baselines.register("hf")
def hf_baseline(spec: TowerSpec) -> Baseline:
    """Load `hf:NAME_OR_FOLDER`."""
    try:
        config = AutoConfig.from_pretrained(spec.name)
        _check_sides(spec, config)
        with fixed_seed(), quiet():
            if spec.pretrained and spec.weights is None:
                model = AutoModel.from_pretrained(spec.name, dtype=torch.float32)
            else:
                model = AutoModel.from_config(config, dtype=torch.float32)
        _check_sides(spec, config, model)
        tokenizer = AutoTokenizer.from_pretrained(spec.name)
        preprocess = HfPreprocess(AutoImageProcessor.from_pretrained(spec.name))
    except _OneSideError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"transformers could not load the model {spec.name!r}: {error}. Expected a hub name or a folder with "
            "config.json, weights, tokenizer files and preprocessor_config.json"
        ) from error
    if spec.weights is not None:
        load_weights(model, spec.weights)
    model.eval()
    vision = HfSide(model, "vision", f"hf:{spec.name}", None, ImageContract(0, transform=preprocess))
    text = HfSide(model, "text", f"hf:{spec.name}", None, LibraryTokenizer(tokenizer, 1))
    _keep_side(vision, vision.example())
    _keep_side(text, dict(tokenizer(["a photo"], return_tensors="pt")))
    text.contract = _with_padding(text, tokenizer)
    bias = model.logit_bias.item() if hasattr(model, "logit_bias") else None
    return Baseline(vision.finish(), text.finish(), _scale(model), bias)


class _OneSideError(ValueError):
    """The model lacks a side."""


def _check_sides(spec: TowerSpec, config: Any, model: Any = None) -> None:
    """Raise before weights are read where the config has no texts or images, later where the model embeds none."""
    sides = {"text": ("text_config",), "image": ("vision_config", "image_config")}
    told = {side for side, names in sides.items() if any(hasattr(config, name) for name in names)}
    embeds = told if model is None else {side for side in told if hasattr(model, f"get_{side}_features")}
    if lacking := [side for side in sides if side not in embeds]:
        what = "one side alone" if not told else f"no {lacking[0]} side that embeds by itself"
        raise _OneSideError(
            f"hf:{spec.name} ({config.model_type}) has {what}; expected a model of images and texts, such as CLIP, "
            "SigLIP, ALIGN, AltCLIP or FLAVA; give one, or train a run with this as one of its towers"
        )


def _keep_side(tower: HfSide, inputs: Inputs) -> None:
    """Leave in a tower's body only the parts that its forward runs through; they stay those of the model."""
    called = {call.path.partition(".")[0] for call in trace(tower.body, lambda: tower(inputs), lambda values: None)}
    side = copy.copy(tower.body)
    side._modules = {name: part for name, part in side._modules.items() if name in called}
    side._parameters = {}  # the scale and the bias, which belong to neither side
    tower.body = side


@torch.no_grad()
def _with_padding(tower: HfSide, tokenizer: Any) -> LibraryTokenizer:
    """Return the tokenizer with the context of the text side, padding all texts to it where padding is looked at.

    A model whose answer changes with its padding (SigLIP reads the last place, and masks nothing) was trained at one
    length; where it does not change, the longest of a batch is length enough.
    """
    tables = (m for n, m in tower.body.named_modules() if n.endswith(("position_embedding", "position_embeddings")))
    table = next((m for m in tables if isinstance(m, nn.Embedding)), None)
    # RoBERTa counts positions from padding_idx + 1
    rows = 8192 if table is None else table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    contract = LibraryTokenizer(tokenizer, min(rows, int(tokenizer.model_max_length)))
    encoded = contract.encode(["a photo of a red boat"])[0]
    short = tower(contract.pad(encoded))
    contract.padding = "max_length"
    if torch.allclose(F.normalize(short, dim=-1), F.normalize(tower(contract.pad(encoded)), dim=-1), atol=1e-3):
        contract.padding = "longest"
    return contract


def _scale(model: Any) -> float:
    if hasattr(model, "logit_scale"):
        return float(model.logit_scale.exp().item())
    return 1 / float(model.temperature.item()) if hasattr(model, "temperature") else 1.0  # ALIGN divides
