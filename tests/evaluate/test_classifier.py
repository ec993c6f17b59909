"""The original classifier on tuned features: the base scores what the whole model scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lilt import DualEncoder
from lilt.data import eval_transform, open_image
from lilt.evaluate import Setting, parse_task
from lilt.towers import ImageContract, build_classifier
from tests.evaluate.conftest import manifest


@pytest.fixture
def photographs(pictures: Path, tmp_path: Path) -> str:
    """All 24 pictures with made-up classes of a model of three."""
    files = sorted(f for f in pictures.iterdir() if f.suffix in (".png", ".jpg"))
    return manifest(tmp_path / "p.jsonl", [{"image": str(f), "label": i % 3} for i, f in enumerate(files)])


def test_before_and_after_and_what_was_kept(tuned: DualEncoder, photographs: str, tiny_vision: str) -> None:
    task = parse_task(f"conserve(classifier(data={photographs}))")
    found = dict(task(tuned, Setting(batch_size=7)))
    whole = build_classifier(tiny_vision)
    contract = tuned.core.vision.contract
    assert isinstance(contract, ImageContract)
    entries = [line.split('"')[3] for line in Path(photographs).read_text().splitlines()]
    images = torch.stack([eval_transform(contract)(open_image(path)) for path in entries])
    expected = 100 * float((whole(images).argmax(1) == torch.arange(24) % 3).double().mean())
    assert found["classifier/top1/before"] == pytest.approx(expected)
    assert found["classifier/top1/kept"] == pytest.approx(100 * found["classifier/top1/after"] / expected)
    assert (found["num_classifier/images"], found["num_classifier/classes"]) == (24, 3)
    # and after training it is the last layer on the tower's own pooled features
    head = whole.body.get_submodule("head")
    with torch.no_grad():
        logits = head(tuned.core.vision(images))
    after = 100 * float((logits.argmax(1) == torch.arange(24) % 3).double().mean())
    assert found["classifier/top1/after"] == pytest.approx(after)


def test_a_label_out_of_range_is_an_error(tuned: DualEncoder, tmp_path: Path) -> None:
    data = manifest(tmp_path / "p.jsonl", [{"image": "a.png", "label": 3}])
    with pytest.raises(ValueError, match=r"p.jsonl line 1: label 3 is out of range; the classifier has 3 classes, exp"):
        dict(parse_task(f"classifier(data={data})")(tuned))


def test_names_are_no_numbers_of_classes(tuned: DualEncoder, tmp_path: Path) -> None:
    data = manifest(tmp_path / "p.jsonl", [{"image": "a.png", "label": "cat"}])
    with pytest.raises(
        ValueError, match=r"line 1: label 'cat' is out of range; .*name the field that has it with label="
    ):
        dict(parse_task(f"classifier(data={data})")(tuned))
