"""Image models with the classifier they were trained with: teachers of class distributions, witnesses of knowledge."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lilt.registry import Registry
from lilt.towers.base import ImageContract
from lilt.towers.image_models import hf_contract, timm_contract, timm_model
from lilt.towers.loading import load_weights, py_factory, quiet
from lilt.towers.spec import TowerSpec


class Classifier(nn.Module):
    """An image model that ends in class logits: (B, 3, H, W) -> (B, dim). It is frozen and in eval mode."""

    def __init__(self, body: nn.Module, label: str, contract: ImageContract):
        super().__init__()
        self.body = body
        self.contract = contract
        takes = inspect.signature(body.forward).parameters
        self.more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        px = contract.image_px
        self.eval().float().requires_grad_(False)
        with torch.no_grad():
            shape = self(torch.zeros(1, 3, px, px)).shape
        if len(shape) != 2 or getattr(body, "num_classes", None) == 0:
            raise ValueError(
                f"{label} has no classifier; expected class logits (B, classes), not {tuple(shape)}; give an image "
                "model that was trained to classify"
            )
        self.dim = int(shape[1])

    def forward(self, images: Tensor) -> Tensor:
        raw = self.body(images, **self.more)
        logits: Tensor = getattr(raw, "logits", raw)
        return logits


classifiers: Registry[Callable[[TowerSpec], Classifier]] = Registry("classifier source")


@classifiers.register("timm")
def timm_classifier(spec: TowerSpec) -> Classifier:
    """Build `timm:NAME` with its own classifier."""
    body = timm_model(spec)
    return Classifier(body, f"timm:{spec.name}", timm_contract(body, spec))


@classifiers.register("hf")
def hf_classifier(spec: TowerSpec) -> Classifier:
    """Build `hf:NAME_OR_PATH` with its own classifier."""
    spec.refuse_extra()
    try:
        with quiet():
            body = AutoModelForImageClassification.from_pretrained(spec.name, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(spec.name, use_fast=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers could not load the classifier {spec.name!r}: {error}. Expected a hub name or a folder of "
            "an image classification model with preprocessor_config.json"
        ) from error
    if spec.weights is not None:
        load_weights(body, spec.weights)
    return Classifier(body, f"hf:{spec.name}", hf_contract(processor, f"hf:{spec.name}", spec))


@classifiers.register("py")
def py_classifier(spec: TowerSpec) -> Classifier:
    """Build `py:package.module:function`; the function returns a module that gives logits, and its ImageContract."""
    module, contract, spec = py_factory(spec)
    if not isinstance(contract, ImageContract):
        raise ValueError(
            f"py:{spec.name} brought {type(contract).__name__} as its preprocess; a classifier is shown images that "
            "others have prepared, so it needs lilt.ImageContract(image_px=…, mean=…, std=…); return one beside it"
        )
    return Classifier(module, f"py:{spec.name}", contract)
