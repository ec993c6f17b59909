"""Late interaction against a loop over pairs of tokens: every size of piece, every mask, ties and broken numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.evaluate import retrieval
from lilt.evaluate.late import Bags, late
from lilt.evaluate.retrieval import image_to_text_ranks, text_to_image_ranks
from tests.evaluate.test_retrieval import memory

CLEAR = Path("/proc/self/clear_refs")
WIDTH = 6


def unit(rows: int, seed: int, width: int = WIDTH) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def bags(sizes: list[int], seed: int, width: int = WIDTH) -> Bags:
    return Bags.of(unit(sum(sizes), seed, width), torch.tensor(sizes))


def items(some: Bags) -> list[list[list[float]]]:
    """The rows of each item as numbers."""
    spans = zip(some.starts.tolist(), some.sizes.tolist(), strict=True)
    return [some.rows[start : start + size].tolist() for start, size in spans]


def slow(ours: Bags, theirs: Bags) -> list[list[float]]:
    """Scores one dot product at a time."""

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True))

    return [
        [sum(max(cosine(x, y) for y in their) for x in mine) / len(mine) for their in items(theirs)]
        for mine in items(ours)
    ]


IMAGES, TEXTS = [4] * 9, [3, 1, 5, 2, 2, 7, 1, 4, 3, 6, 2]


@pytest.mark.parametrize("room", [1, 7, 40, 300, 2**24])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_scores_are_those_of_a_slow_loop(ragged: bool, room: int) -> None:
    image, text = bags(TEXTS[::-1] if ragged else IMAGES, 1), bags(TEXTS, 2)
    for ours, theirs in ((image, text), (text, image)):
        torch.testing.assert_close(late(ours, theirs, room=room), torch.tensor(slow(ours, theirs)), rtol=0, atol=1e-6)
        assert torch.equal(late(ours, theirs, room=room), late(ours, theirs))
    assert (late(image, text) - late(text, image).T).abs().max() > 0.1  # who asks makes a difference


def test_items_may_be_chosen_in_any_order_and_twice() -> None:
    text = bags(TEXTS, 2)
    order = torch.tensor([5, 0, 0, 10, 3])
    whole = late(text, bags(IMAGES, 1))
    assert torch.equal(late(text[order], bags(IMAGES, 1)), whole[order])
    assert torch.equal(late(text[2:5], bags(IMAGES, 1)), whole[2:5])
    assert len(text[2:5]) == 3


def case(seed: int) -> tuple[Bags, Bags, Tensor]:
    """Nine images, two of them equal, and 15 captions, some said of several images."""
    image = bags(IMAGES, seed)
    image.rows[8:12] = image.rows[20:24].clone()  # images 2 and 5
    owner = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 2, 0, 7, 5, 1])
    text = bags(TEXTS, seed + 1)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3, 3, 2, 6])]
    return image, text, owner


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_slow_scores_and_ties_count_against_the_model(seed: int, chunk: int) -> None:
    image, text, owner = case(seed)
    own = owner.tolist()
    asked = [[round(s, 6) for s in row] for row in slow(text, image)]
    to_image = [1 + sum(row[i] >= row[own[t]] for i in range(len(image)) if i != own[t]) for t, row in enumerate(asked)]
    to_text = []
    for i, row in enumerate([[round(s, 6) for s in row] for row in slow(image, text)]):
        best = max(s for s, o in zip(row, own, strict=True) if o == i)
        to_text.append(1 + sum(s >= best for s, o in zip(row, own, strict=True) if o != i))
    score = partial(late, room=100)
    assert text_to_image_ranks(image, text, owner, chunk, score).tolist() == to_image
    assert image_to_text_ranks(image, text, owner, chunk, score).tolist() == to_text
    assert to_image[2] > 1 and to_image[5] > 1  # their images are equal
    result = retrieval(image, text, owner, chunk, score)
    assert result["text_to_image"]["R@1"] == pytest.approx(100 * sum(r == 1 for r in to_image) / len(to_image))
    assert result["image_to_text"]["R@5"] == pytest.approx(100 * sum(r <= 5 for r in to_text) / len(to_text))


def test_one_token_each_is_the_cosine() -> None:
    image, text = unit(13, 1), unit(33, 2)
    owner = torch.cat([torch.arange(13), torch.randint(13, (20,), generator=torch.Generator().manual_seed(0))])
    seen, read = (Bags.of(rows, torch.ones(len(rows), dtype=torch.long)) for rows in (image, text))
    torch.testing.assert_close(late(seen, read), image @ text.T, rtol=0, atol=1e-6)
    assert retrieval(seen, read, owner, 5, late) == retrieval(image, text, owner)


def test_padding_never_counts() -> None:
    """The rows next to an item's own, which fill it up, may be anything."""
    text, image = bags([2, 5, 1], 1), bags([3, 3], 2)
    expected = torch.tensor(slow(image[:1], text[:1])), torch.tensor(slow(text[:1], image[:1]))
    text.rows[2:] = float("nan")
    image.rows[3:] = float("nan")
    assert not late(image, text)[0, 1:].isfinite().any()
    torch.testing.assert_close(late(image, text)[:1, :1], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(late(text, image)[:1, :1], expected[1], rtol=0, atol=1e-6)


def test_numbers_that_are_none_are_never_found() -> None:
    image, text = bags([3] * 4, 1), bags([2] * 4, 2)
    image.rows[4] = float("nan")  # one token of image 1
    owner = torch.arange(4)
    assert text_to_image_ranks(image, text, owner, score=late)[1] == 4
    assert image_to_text_ranks(image, text, owner, score=late)[1] == 4


def test_an_item_without_a_token_is_never_found_and_finds_nothing() -> None:
    image, text = bags([3, 2, 2, 4], 1), bags([2, 0, 4, 0], 2)
    owner = torch.arange(4)
    assert text_to_image_ranks(image, text, owner, score=late).tolist()[1::2] == [4, 4]
    assert image_to_text_ranks(image, text, owner, score=late).tolist()[1::2] == [4, 4]
    torch.testing.assert_close(late(image, text)[:, 2], torch.tensor(slow(image, text[2:3]))[:, 0], rtol=0, atol=1e-6)


@pytest.mark.skipif(not CLEAR.exists(), reason="only Linux lets a process restart the count of its peak memory")
def test_tokens_of_all_pairs_are_never_in_memory_at_once() -> None:
    # all cosines of their tokens would take 0.8 GB in float64
    image, text = bags([49] * 200, 1, 16), bags([10 + n % 9 for n in range(800)], 2, 16)
    late(image[:2], text[:2])
    CLEAR.write_text("5")
    before = memory("VmRSS")
    retrieval(image, text, torch.arange(800) // 4, score=partial(late, room=2**21))
    assert memory("VmHWM") - before < 100 * 2**20
