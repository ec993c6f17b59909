"""Which searches are shown, and in what order their answers stand."""

from __future__ import annotations

import math

import pytest
import torch

from lilt.data import Sample
from lilt.evaluate import Embedded
from lilt.evaluate.retrieval import image_to_text_ranks, text_to_image_ranks
from lilt.report.gallery import gallery_section
from lilt.report.retrievals import best, draw, search


@pytest.mark.parametrize(
    ("right", "wrong", "count", "expected"),
    [
        (50, 50, 8, (4, 4)),
        (50, 50, 7, (3, 4)),
        (1, 99, 8, (1, 7)),
        (99, 1, 8, (7, 1)),
        (0, 9, 4, (0, 4)),
        (2, 1, 9, (2, 1)),
    ],
)
def test_half_are_right_where_there_are_so_many(right: int, wrong: int, count: int, expected: tuple[int, int]) -> None:
    ranks = torch.tensor([1] * right + [7] * wrong)[
        torch.randperm(right + wrong, generator=torch.Generator().manual_seed(3))
    ]
    drawn = draw(ranks, count)
    assert len(set(drawn)) == len(drawn)
    found = [int(ranks[i]) for i in drawn]
    assert found == [1] * expected[0] + [7] * expected[1]
    assert draw(ranks, count) == drawn
    # nobody picks: not the first ones, and not all from one end
    if count < right:
        assert drawn[: expected[0]] != sorted(drawn[: expected[0]])


def test_answers_stand_as_the_recalls_count_them() -> None:
    """The place of the best right answer is its rank, with ties and with scores that are no numbers."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-1, 2, (7, 3), generator=generator).float()  # many ties
    text = torch.randint(-1, 2, (21, 3), generator=generator).float()
    image[3], text[5] = math.nan, math.nan
    owner = torch.arange(21) % 7
    to_image, to_text = text_to_image_ranks(image, text, owner), image_to_text_ranks(image, text, owner)
    samples = [Sample(f"{i}.png", tuple(f"{i} {n}" for n in range(3)), "test") for i in range(7)]
    order = owner.argsort(stable=True)  # captions of one image stand together in a split
    embedded = Embedded(image, text[order], owner[order], 7, [], 0)
    found = search(embedded, samples, "test", 21)
    assert sorted(s.query for s in found.by_caption) == list(range(21))
    for answer in found.by_caption:
        own = [hit.place for hit in answer.hits if hit.own]
        assert own == [answer.rank] == [int(to_image[order[answer.query]])]
    assert sorted(s.query for s in found.by_image) == list(range(7))
    for answer in found.by_image:
        assert min(hit.place for hit in answer.hits if hit.own) == answer.rank == int(to_text[answer.query])
    assert found.first[0] == pytest.approx(100 * sum(r == 1 for r in to_image.tolist()) / 21)


def test_a_tie_is_shown_before_the_right_answer() -> None:
    scores = torch.tensor([0.5, 0.9, 0.9, 0.1])
    hits = best(scores, torch.tensor([False, True, False, False]))
    assert [(hit.index, hit.place, hit.own) for hit in hits] == [
        (2, 1, False),
        (1, 2, True),
        (0, 3, False),
        (3, 4, False),
    ]


def test_the_right_answer_is_shown_wherever_it_is() -> None:
    scores = torch.linspace(1, 0, 100)
    hits = best(scores, torch.arange(100) == 71)
    assert [hit.place for hit in hits] == [1, 2, 3, 4, 5, 72] and hits[-1].own
    assert hits[-1].cosine == pytest.approx(float(scores[71]))


def test_pictures_that_vanished_are_counted() -> None:
    samples = [Sample(f"/nowhere/{i}.png", (f"<b>{i}</b>",), "a&b") for i in range(3)]
    rows = torch.eye(3)
    found = search(Embedded(rows, rows, torch.arange(3), 3, [], 0), samples, "a&b", 2)
    text = str(gallery_section(found, ""))
    assert "3 images that were read before cannot be read any more." in text
    assert "&lt;b&gt;0&lt;/b&gt;" in text and "<b>0" not in text and "<img" not in text and "a&amp;b" in text
