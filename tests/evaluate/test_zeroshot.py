"""Zero-shot classification against a loop over images and classes, and open_clip's own ensembling of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt import DualEncoder
from lilt.evaluate import Setting, Subject, parse_task, zeroshot
from lilt.evaluate.words import fill, read_templates
from tests.conftest import COLOURS
from tests.evaluate.conftest import BY_NAME, grey, manifest

NAMES = sorted(COLOURS)
TEMPLATES = ["a {} picture", "all of it is {}", "the {} paint on the paper", "{}"]


@pytest.fixture
def templates(tmp_path: Path) -> str:
    (tmp_path / "t.txt").write_text("\n".join(TEMPLATES))
    return str(tmp_path / "t.txt")


@pytest.mark.parametrize("at_once", [1, 5, 10000])
def test_classes_are_those_of_open_clips_own_ensemble(
    tuned: DualEncoder, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Its function takes any model with encode_text."""

    class Peer:
        def encode_text(self, texts: Any, normalize: bool) -> Tensor:
            rows = tuned.embed(texts=texts.said)["text"]
            return F.normalize(rows, dim=-1) if normalize else rows

    class Said:
        def __init__(self, said: list[str]):
            self.said = said

        def to(self, device: Any) -> Said:
            return self

    expected = open_clip.build_zero_shot_classifier(Peer(), Said, NAMES, TEMPLATES, num_classes_per_batch=4)
    monkeypatch.setattr(zeroshot, "PROMPTS_AT_ONCE", at_once)
    rows, cut = zeroshot.class_rows(Subject(tuned, Setting(batch_size=3)), NAMES, TEMPLATES)
    assert cut == 0
    torch.testing.assert_close(rows, expected.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))


def slow(model: DualEncoder, files: list[Path], names: list[str], templates: list[str]) -> list[int]:
    """The rank of each file's colour: one image, one class and one prompt at a time."""
    centres = []
    for name in names:
        prompts = [model.embed(texts=fill(t, name))["text"][0].double() for t in templates]
        mean = sum(prompts[1:], prompts[0]) / len(prompts)
        centres.append(mean / mean.norm())
    ranks = []
    for file in files:
        image = model.embed(images=[file])["image"][0].double()
        scores = [float(image @ centre) for centre in centres]
        own = scores[names.index(file.stem[:-1])]
        ranks.append(1 + sum(s >= own for n, s in zip(names, scores, strict=True) if n != file.stem[:-1]))
    return ranks


def test_accuracies_are_those_of_a_slow_loop(
    tuned: DualEncoder, setting: Setting, templates: str, pictures: Path
) -> None:
    found = dict(parse_task(f"zeroshot({BY_NAME},templates={templates},split=train|val)")(tuned, setting))
    ranks = slow(tuned, sorted(pictures.glob("*[012].*")), NAMES, TEMPLATES)
    assert 0 < sum(r == 1 for r in ranks) < 18  # something to get wrong
    assert found["top1"] == pytest.approx(100 * sum(r == 1 for r in ranks) / 18)
    assert found["top5"] == pytest.approx(100 * sum(r <= 5 for r in ranks) / 18)
    assert (found["num_images"], found["num_classes"], found["num_templates"]) == (18, 6, 4)


def test_a_single_template_is_the_default(tuned: DualEncoder, setting: Setting, pictures: Path) -> None:
    found = dict(parse_task(f"zeroshot({BY_NAME})")(tuned, setting))
    ranks = slow(tuned, sorted(pictures.glob("*3.*")), NAMES, ["a photo of a {}."])
    assert found["top1"] == pytest.approx(100 * sum(r == 1 for r in ranks) / 6)
    assert found["num_images"] == 6


def test_names_by_label_number_and_the_80_templates(tuned: DualEncoder, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("blue\nred\n")
    grey(tmp_path / "x" / "0" / "a.png", 10)
    grey(tmp_path / "x" / "1" / "a.png", 230)
    found = dict(parse_task(f"zeroshot(data={tmp_path / 'x'},classes={tmp_path / 'c.txt'},templates=openai80)")(tuned))
    assert (found["num_images"], found["num_classes"], found["num_templates"]) == (2, 2, 80)
    assert "top5" not in found
    assert len(read_templates("openai80")) == 80


def test_each_image_is_encoded_once(tuned: DualEncoder, setting: Setting, templates: str) -> None:
    seen = 0

    def count(module: Any, args: tuple[Tensor]) -> None:
        nonlocal seen
        seen += len(args[0])

    handle = tuned.core.vision.register_forward_pre_hook(count)
    dict(parse_task(f"zeroshot({BY_NAME},templates={templates})")(tuned, setting))
    handle.remove()
    assert seen == 6


def test_classes_of_one_name_tie_and_ties_are_wrong(tuned: DualEncoder, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("red\nred\nred\n")
    records = [{"image": str(grey(tmp_path / "a.png")), "label": 0}]
    spec = f"zeroshot(data={manifest(tmp_path / 'x.jsonl', records)},classes={tmp_path / 'c.txt'})"
    assert dict(parse_task(spec)(tuned))["top1"] == 0


def test_what_cannot_be_read_is_counted_and_too_few_are_an_error(tuned: DualEncoder, tmp_path: Path) -> None:
    records = [{"image": str(grey(tmp_path / f"{i}.png", 50 * i)), "label": "blue"} for i in range(3)]
    records += [{"image": str(tmp_path / "gone.png"), "label": "red"}]
    data = manifest(tmp_path / "x.jsonl", records)
    found = dict(parse_task(f"zeroshot(data={data})")(tuned))
    assert (found["num_images"], found["num_unreadable"], found["num_classes"]) == (3, 1, 2)
    kept = {}
    with pytest.raises(ValueError, match="zeroshot: readable images: found 3, expected 4"):
        for name, value in parse_task(f"zeroshot(data={data},expected=4)")(tuned):
            kept[name] = value
    assert kept == found
    with pytest.raises(ValueError, match="zeroshot: labelled images: found 4, expected 5; complete the data, or leave"):
        dict(parse_task(f"zeroshot(data={data},expected=5)")(tuned))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zeroshot", "zeroshot has no data; expected a manifest or a folder of images; give zeroshot"),
        ("zeroshot(data=DATA)", "numbers its classes .* and class names are missing"),
        (
            "zeroshot(data=DATA,classes=imagenet)",
            "x.jsonl line 1: label 1000 is out of range; the classes file has 1000",
        ),
        ("zeroshot(data=DATA,label=name)", "none of the 1 images could be read .first: .*gone.png"),
        ("zeroshot(data=nowhere.jsonl)", "manifest 'nowhere.jsonl' does not exist"),
    ],
)
def test_bad_input_is_an_error(tuned: DualEncoder, tmp_path: Path, spec: str, message: str) -> None:
    data = manifest(tmp_path / "x.jsonl", [{"image": "gone.png", "label": 1000, "name": "boat"}])
    with pytest.raises(ValueError, match=message):
        dict(parse_task(spec.replace("DATA", data))(tuned))
