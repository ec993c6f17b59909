"""Who belongs with whom, block by block, against plain loops."""

from __future__ import annotations

import pytest
import torch

from lilt.losses import SAME, Relation
from tests.losses.batches import joint, related

# rows 0 and 2 show one image, rows 1 and 2 have one caption
IMAGE, TEXT = torch.tensor([7, 8, 7, 9]), torch.tensor([1, 2, 2, 4])
DIAGONAL = torch.eye(4, dtype=torch.bool)
ALIKE = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
EXPECTED = {"positive": (ALIKE, None), "ignored": (DIAGONAL, ALIKE & ~DIAGONAL), "negative": (DIAGONAL, None)}
blocks = pytest.mark.parametrize("images", [slice(0, 4), slice(2, 4), slice(1, 2)])


@blocks
@pytest.mark.parametrize("texts", [slice(0, 4), slice(0, 3)])
@pytest.mark.parametrize("same", SAME)
def test_a_block_is_a_piece_of_the_whole(same: str, images: slice, texts: slice) -> None:
    positive, out = Relation(IMAGE, TEXT, same=same).relate(images, texts)
    near, left_out = EXPECTED[same]
    assert torch.equal(positive, near[images, texts])
    assert (out is None) == (left_out is None)
    assert out is None or left_out is None or torch.equal(out, left_out[images, texts])


@blocks
@pytest.mark.parametrize("seed", range(9))
def test_padding_takes_no_part(seed: int, images: slice) -> None:
    relation = joint(seed).relation
    texts = slice(seed, 12)
    positive, out = relation.relate_valid(images, texts)
    near, left_out, real = (torch.tensor(x) for x in related(relation))
    assert out is not None
    assert torch.equal(positive, (near & real.unsqueeze(1))[images, texts])
    assert torch.equal(out, (left_out | ~real.unsqueeze(1))[images, texts])


def test_an_unknown_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="same='both'; expected one of positive, ignored, negative; choose one"):
        Relation(IMAGE, TEXT, same="both")


@pytest.mark.parametrize("valid", [None, torch.ones(3, dtype=torch.bool)])
def test_facts_of_different_batches_are_an_error(valid: torch.Tensor | None) -> None:
    image = IMAGE if valid is not None else IMAGE[:3]
    with pytest.raises(ValueError, match=r"have the shapes \[.*3.*\]; expected one number per pair .*; gather all"):
        Relation(image, TEXT, valid)


def test_facts_in_columns_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shapes \[\(4, 1\), \(4, 1\)\]; expected one number per pair"):
        Relation(IMAGE.unsqueeze(1), TEXT.unsqueeze(1))
