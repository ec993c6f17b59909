"""A tower read by the classifier of its own model says what the model says, tuned or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from timm.models import save_for_hf
from torch import nn

from lilt.policies import apply, parse_policy, plan
from lilt.towers import build_classifier, build_tower
from lilt.towers.original import original_logits, prove_fit
from lilt.towers.templates import imagenet_classes, imagenet_templates
from tests.towers.families import SWIN, VIT

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LABELS: dict[str, Any] = {"num_labels": 5}
PATCHES: dict[str, Any] = LABELS | {"image_size": 32, "patch_size": 8}
SWIN_HF: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4
}  # fmt: skip
CONVNEXT_HF: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
RESNET_HF: dict[str, Any] = {
    "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"
}  # fmt: skip
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit_fc_norm": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (16, 16, 32, 32)}),
    "resnet": ("test_resnet", {}),
    "efficientnet": ("test_efficientnet", {}),
}
HF: dict[str, Callable[[], Any]] = {
    "hf_vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SHAPE, **PATCHES)),
    "hf_dinov2": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, **PATCHES)
    ),
    "hf_swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN_HF, **LABELS)),
    "hf_convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT_HF, **LABELS)),
    "hf_resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET_HF, **LABELS)),
}


def saved(family: str, folder: Path) -> str:
    """Save a small classifier of a family and return its spec."""
    torch.manual_seed(0)
    model: Any
    if family in HF:
        model = HF[family]()
        shake(model)
        model.save_pretrained(folder)
        hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return f"hf:{folder}"
    name, options = TIMM[family]
    model = timm.create_model(name, num_classes=5, **options)
    shake(model)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    save_for_hf(model, str(folder), model_args=options, safe_serialization=True)
    return f"timm:{folder}"


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Let every part matter: fresh norms do nothing and fresh heads are zero."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("pool", ["own", "mean"])
@pytest.mark.parametrize("family", [*TIMM, *HF])
def test_before_training_it_is_the_model_itself(family: str, pool: str, tmp_path: Path) -> None:
    spec = saved(family, tmp_path)
    classifier, tower = build_classifier(spec), build_tower(f"{spec}?pool={pool}", "vision").eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = classifier(images)
    torch.testing.assert_close(original_logits(classifier, tower, images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier(images), expected)  # it still answers by itself
    prove_fit(classifier, tower)
    other = copy.deepcopy(tower, {id(tower.contract): tower.contract})
    shake(other)
    with pytest.raises(ValueError, match="its logits are not those of the whole model"):
        prove_fit(classifier, other)


@pytest.mark.parametrize("family", ["vit", "vit_fc_norm", "convnext", "swin", "hf_vit", "hf_dinov2", "hf_swin"])
def test_after_training_it_is_the_model_with_those_weights(family: str, tmp_path: Path) -> None:
    spec = saved(family, tmp_path)
    classifier, tower = build_classifier(spec), build_tower(spec, "vision").eval()
    apply(plan(parse_policy("full", "vision"), tower), tower)
    shake(tower)
    twin = build_classifier(spec)
    body: Any = twin.body
    inner = body if family in TIMM else getattr(body, body.base_model_prefix)
    inner.load_state_dict(tower.body.state_dict(), strict=False)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = original_logits(classifier, tower, images)
    torch.testing.assert_close(found, twin(images), rtol=1e-4, atol=1e-5)
    assert (found - classifier(images)).abs().max() > 1e-2


def test_what_a_policy_adds_is_heard(tmp_path: Path) -> None:
    spec = saved("vit", tmp_path)
    classifier, tower = build_classifier(spec), build_tower(spec, "vision").eval()
    apply(plan(parse_policy("adapter", "vision"), tower), tower)
    shake(tower)
    images = torch.randn(2, 3, 32, 32)
    assert (original_logits(classifier, tower, images) - classifier(images)).abs().max() > 1e-2


def test_a_tower_cut_short_or_of_another_model_does_not_fit(tmp_path: Path) -> None:
    spec = saved("vit", tmp_path / "vit")
    classifier = build_classifier(spec)
    with pytest.raises(ValueError, match="cannot be read by the classifier of VisionTransformer: its logits are not"):
        prove_fit(classifier, build_tower(f"{spec}?layers=1", "vision").eval())
    foreign = build_tower(saved("convnext", tmp_path / "convnext"), "vision").eval()
    with pytest.raises(
        ValueError, match=r"cannot be read by the classifier .*leave out layers, or give the spec of the"
    ):
        prove_fit(build_classifier(saved("resnet", tmp_path / "resnet")), foreign)


def test_two_heads_do_not_fit(tmp_path: Path) -> None:
    size: dict[str, Any] = {**VIT}
    model: Any = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **size)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = "&".join(f"{key}={value}" for key, value in VIT.items())
    spec = f"timm:deit_tiny_distilled_patch16_224?{options}&weights={tmp_path / 'w.pth'}"
    classifier = build_classifier(f"{spec}&num_classes=5")
    with pytest.raises(ValueError, match="it has two classifiers, each on a token of its own"):
        prove_fit(classifier, build_tower(spec, "vision").eval())


def test_words_of_imagenet() -> None:
    assert (len(imagenet_templates()), len(imagenet_classes())) == (80, 1000)
    assert all(template.count("{}") == 1 for template in imagenet_templates())
