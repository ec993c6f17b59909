"""Winoground's three scores against a loop over groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt import DualEncoder
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.winoground import winoground
from tests.evaluate.conftest import manifest


def unit(groups: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(groups, 2, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow(image: Tensor, text: Tensor) -> dict[str, list[bool]]:
    """The scores as the paper writes them: s(C, I), C captions and I images."""
    found: dict[str, list[bool]] = {"text": [], "image": [], "group": []}
    for i, c in zip(image.double(), text.double(), strict=True):

        def s(caption: int, picture: int, c: Tensor = c, i: Tensor = i) -> float:
            return sum(a * b for a, b in zip(c[caption].tolist(), i[picture].tolist(), strict=True))

        found["text"].append(s(0, 0) > s(1, 0) and s(1, 1) > s(0, 1))
        found["image"].append(s(0, 0) > s(0, 1) and s(1, 1) > s(1, 0))
        found["group"].append(found["text"][-1] and found["image"][-1])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_paper(seed: int) -> None:
    image = unit(200, seed)
    text = F.normalize(image + 1.5 * unit(200, seed + 9), dim=-1)
    found, expected = winoground(image, text), slow(image, text)
    assert {name: right.tolist() for name, right in found.items()} == expected
    assert len({sum(right) for right in expected.values()}) == 3


def test_chance_is_a_quarter_a_quarter_and_a_sixth() -> None:
    found = winoground(unit(20000, 1), unit(20000, 2))
    shares = [float(right.double().mean()) for right in found.values()]
    assert shares == pytest.approx([1 / 4, 1 / 4, 1 / 6], abs=0.015)


def test_ties_are_wrong() -> None:
    same = unit(3, 1)[:, :1].expand(-1, 2, -1)
    for image, text in ((same, unit(3, 2)), (unit(3, 2), same), (same, same)):
        assert not any(right.any() for right in winoground(image, text).values())


@pytest.fixture
def groups(pictures: Path, tmp_path: Path) -> str:
    """Three groups, the last with a missing image; the published set writes no endings."""
    pairs = [("red0", "blue0"), ("green2", "red0"), ("yellow0", "gone")]
    fields = [
        {"image_0": a, "image_1": b, "caption_0": f"{a[:-1]} picture", "caption_1": f"{b[:-1]} picture"}
        for a, b in pairs
    ]
    return manifest(tmp_path / "w.jsonl", fields)


def test_the_task_embeds_each_image_and_caption_once(tuned: DualEncoder, groups: str, pictures: Path) -> None:
    rows = {"vision": 0, "text": 0}

    def count(side: str) -> torch.utils.hooks.RemovableHandle:
        def add(module: torch.nn.Module, args: tuple) -> None:
            rows[side] += len(args[0] if side == "vision" else args[0]["input_ids"])

        return getattr(tuned.core, side).register_forward_pre_hook(add)

    handles = [count(side) for side in rows]
    found = dict(parse_task(f"winoground(data={groups},image_root={pictures})")(tuned, Setting(batch_size=2)))
    for handle in handles:
        handle.remove()
    assert rows == {"vision": 4, "text": 5}
    assert (found["num_groups"], found["num_unreadable"], found["num_cut_captions"]) == (2, 1, 0)
    names = [["red0", "blue0"], ["green2", "red0"]]
    image = torch.stack([tuned.embed(images=[pictures / f"{n}.png" for n in pair])["image"] for pair in names])
    text = torch.stack([tuned.embed(texts=[f"{n[:-1]} picture" for n in pair])["text"] for pair in names])
    for name, right in slow(image, text).items():
        assert found[name] == 100 * sum(right) / 2


def test_fewer_groups_than_expected_keep_their_scores(tuned: DualEncoder, groups: str, pictures: Path) -> None:
    found = {}
    with pytest.raises(ValueError, match="groups with two readable images: found 2, expected 3; complete the data"):
        for name, value in parse_task(f"winoground(data={groups},image_root={pictures},expected=3)")(tuned):
            found[name] = value
    assert {"text", "image", "group", "num_groups"} <= found.keys()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"image_0": "a", "image_1": "b", "caption_0": "c"},
            "line 1: expected texts under image_0, .*; it has image_0",
        ),
        ({"image_0": "a", "image_1": "b", "caption_0": "c", "caption_1": " "}, "line 1: expected texts under image_0"),
        (
            {"image_0": "a", "image_1": "b", "caption_0": "c", "caption_1": "d"},
            "no group of .* has two readable images",
        ),
    ],
)
def test_what_cannot_be_used_is_an_error(tuned: DualEncoder, tmp_path: Path, record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"winoground(data={manifest(tmp_path / 'w.jsonl', [record])})")(tuned))
