"""Recalls and ranks against a loop over all pairs; ties and broken numbers count against the model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.evaluate import flat, retrieval
from lilt.evaluate.retrieval import image_to_text_ranks, text_to_image_ranks

CLEAR = Path("/proc/self/clear_refs")


def unit(rows: int, seed: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """13 images, two of them equal, with 1 to 4 captions each in mixed order, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    image = unit(13, seed)
    image[5] = image[2]
    owner = torch.cat([torch.arange(13), torch.randint(13, (20,), generator=generator)])
    owner = owner[torch.randperm(33, generator=generator)]
    text = F.normalize(image[owner] + 0.8 * unit(33, seed + 1), dim=-1)
    text[10:16] = text[3].clone()
    return image, text, owner


def slow(image: Tensor, text: Tensor, owner: Tensor) -> tuple[list[int], list[int]]:
    """Both lists of ranks, one dot product at a time."""

    def score(i: int, t: int) -> float:
        return round(sum(a * b for a, b in zip(image[i].tolist(), text[t].tolist(), strict=True)), 6)

    own = owner.tolist()
    to_image = [
        1 + sum(score(i, t) >= score(own[t], t) for i in range(len(image)) if i != own[t]) for t in range(len(text))
    ]
    to_text = []
    for i in range(len(image)):
        best = max(score(i, t) for t in range(len(text)) if own[t] == i)
        to_text.append(1 + sum(score(i, t) >= best for t in range(len(text)) if own[t] != i))
    return to_image, to_text


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 33, 512])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_a_slow_loop(seed: int, chunk: int) -> None:
    image, text, owner = case(seed)
    to_image, to_text = slow(image, text, owner)
    assert text_to_image_ranks(image, text, owner, chunk).tolist() == to_image
    assert image_to_text_ranks(image, text, owner, chunk).tolist() == to_text


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_the_summary_is_that_of_the_ranks(chunk: int) -> None:
    image, text, owner = case(5)
    result = retrieval(image, text, owner, chunk)
    recalls = []
    for side, ranks in zip(("text_to_image", "image_to_text"), slow(image, text, owner), strict=True):
        for k in (1, 5, 10):
            recalls.append(100 * sum(r <= k for r in ranks) / len(ranks))
            assert result[side][f"R@{k}"] == pytest.approx(recalls[-1])
        assert result[side]["median_rank"] == statistics.median(ranks)
    assert result["mean_recall"] == pytest.approx(sum(recalls) / 6)
    assert (result["num_images"], result["num_captions"]) == (13, 33)


def test_a_perfect_model_has_all_recalls() -> None:
    eye = torch.eye(12)
    result = retrieval(eye, eye.repeat(2, 1), torch.arange(12).repeat(2))
    assert result["mean_recall"] == 100
    assert result["text_to_image"]["median_rank"] == result["image_to_text"]["median_rank"] == 1


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_a_model_that_says_the_same_of_everything_finds_nothing(chunk: int) -> None:
    same = unit(1, 0).expand(12, -1)
    result = retrieval(same, same, torch.arange(12), chunk)
    assert result["mean_recall"] == 0
    assert result["text_to_image"]["median_rank"] == result["image_to_text"]["median_rank"] == 12


def test_a_caption_of_two_images_ties_with_the_other_image() -> None:
    image = torch.eye(3)
    text, owner = torch.stack([image[0], image[1], image[0], image[2]]), torch.tensor([0, 1, 1, 2])
    # caption 2 is text 0 again, but belongs to image 1
    assert text_to_image_ranks(image, text, owner).tolist() == [1, 1, 3, 1]
    assert image_to_text_ranks(image, text, owner).tolist() == [2, 1, 1]


@pytest.mark.parametrize("where", ["image", "text"])
def test_numbers_that_are_none_are_never_found(where: str) -> None:
    image, text = torch.eye(12), torch.eye(12)
    (image if where == "image" else text).fill_(float("nan"))
    assert retrieval(image, text, torch.arange(12))["mean_recall"] == 0


@pytest.mark.parametrize("ranks", [text_to_image_ranks, image_to_text_ranks])
def test_one_row_that_is_no_number_hurts_itself(ranks: Callable[..., Tensor]) -> None:
    image, text = torch.eye(4), torch.eye(4)
    image[1], text[1] = float("nan"), float("nan")
    found = ranks(image, text, torch.arange(4)).tolist()
    assert found[1] == 4
    assert min(found) > 0


@pytest.mark.parametrize(
    ("images", "owner"), [(3, [0, 0, 2]), (3, [0, 1, 2, 3]), (0, []), (2, [0])], ids=["none", "many", "empty", "last"]
)
def test_images_and_captions_must_fit(images: int, owner: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"{images} images and {len(owner)} captions do not fit; each image needs"):
        retrieval(unit(images, 1), unit(len(owner), 2), torch.tensor(owner, dtype=torch.long))


@pytest.mark.skipif(not CLEAR.exists(), reason="only Linux lets a process restart the count of its peak memory")
def test_a_large_set_fits_in_little_memory() -> None:
    image, text, owner = unit(5000, 1, 64), unit(25000, 2, 64), torch.arange(25000) // 5
    CLEAR.write_text("5")
    before = memory("VmRSS")
    retrieval(image, text, owner)
    assert memory("VmHWM") - before < 600 * 2**20


def memory(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def test_a_result_is_flattened_with_slashes() -> None:
    result = {"text_to_image": {"R@1": 3.0}, "mean_recall": 2.5, "num_images": 7}
    assert dict(flat(result)) == {"text_to_image/R@1": 3.0, "mean_recall": 2.5, "num_images": 7.0}
