"""A teacher sees the student's view in its own normalisation and stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lilt.data import eval_transform
from lilt.model.teacher import Teacher, build_teacher
from lilt.towers import ImageContract, build_classifier, build_tower

STUDENT = ImageContract(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TINY = "timm:test_vit?pretrained=false"  # timm's own model for tests: 160 px, 1000 classes


def own_view(contract: ImageContract, px: int) -> tuple[Tensor, Tensor]:
    """Return one picture as the student and as the teacher would prepare it, without resampling."""
    noise = torch.randint(0, 256, (px, px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())
    views = [ImageContract(px, c.mean, c.std) for c in (STUDENT, contract)]
    student, teacher = (eval_transform(view)(picture).unsqueeze(0) for view in views)
    return student, teacher


@pytest.mark.parametrize("gives", ["features", "logits"])
def test_it_says_of_the_students_view_what_it_says_of_its_own(gives: str) -> None:
    teacher = build_teacher(f"{TINY}&image_px=32", gives, STUDENT)
    network = teacher.network
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    student, own = own_view(ImageContract(32), 32)
    given = teacher(student.requires_grad_())
    assert not given.requires_grad
    assert given.shape == (1, teacher.dim)
    torch.testing.assert_close(given, network(own).detach(), rtol=1e-4, atol=1e-5)
    # a normalisation that is not undone is seen
    assert (given - network(student).detach()).abs().max() > 1e-3


def test_logits_are_those_of_the_models_own_classifier(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    classifier = build_classifier(f"timm:test_vit?num_classes=7&weights={tmp_path / 'w.pth'}")
    images = torch.randn(2, 3, 160, 160)
    assert classifier.dim == 7
    assert torch.equal(classifier(images), model(images))


def test_a_transformers_classifier(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**shape, intermediate_size=32, image_size=32, patch_size=8, id2label=dict(enumerate("abcde")))
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    classifier = build_classifier(f"hf:{tmp_path}")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(classifier(images), model(images).logits)
    assert build_classifier(f"hf:{tmp_path}", image_px=48)(torch.randn(2, 3, 48, 48)).shape == (2, 5)


def test_another_resolution_is_resampled() -> None:
    teacher = build_teacher(f"{TINY}&image_px=64", "features", STUDENT)
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, teacher.dim)


def test_without_a_size_of_its_own_it_works_at_the_students() -> None:
    assert build_teacher(TINY, "features", STUDENT).image_px == 32


def test_it_is_no_part_of_a_model() -> None:
    assert not isinstance(build_teacher(TINY, "features", STUDENT), torch.nn.Module)
    assert isinstance(Teacher, type)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-B-32", "has no classifier that lilt knows to build; expected one of hf:…, py:…, timm:…; give"),
        (f"{TINY}&num_classes=0", r"timm:test_vit has no classifier; expected class logits \(B, classes\)"),
    ],
)
def test_a_teacher_without_classes_cannot_give_them(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_teacher(spec, "logits", STUDENT)


def test_a_preprocess_that_nobody_can_undo_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the student's preprocess is a plain callable.*give the vision tower lilt"):
        build_teacher(TINY, "features", ImageContract(0, transform=lambda image: torch.zeros(3, 8, 8)))


def test_features_are_those_of_the_tower() -> None:
    teacher = build_teacher(f"{TINY}&pool=cls&image_px=32", "features", ImageContract(32))
    images = torch.randn(2, 3, 32, 32)
    tower = build_tower(f"{TINY}&pool=cls&image_px=32", "vision").eval()
    assert torch.equal(teacher(images), tower(images))
