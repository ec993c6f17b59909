"""Which pairs of a batch belong together."""

from __future__ import annotations

import pytest
import torch

from lilt.train.step import pair_up

# rows 0 and 2 show one image, rows 1 and 2 have one caption
IMAGE, TEXT = torch.tensor([7, 8, 7, 9]), torch.tensor([1, 2, 2, 4])
DIAGONAL = torch.eye(4, dtype=torch.bool)
ALIKE = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 4)])
def test_pairs_with_one_image_or_caption_are_positive(rows: slice) -> None:
    positives, ignored = pair_up(IMAGE, TEXT, rows, "positive")
    assert torch.equal(positives, ALIKE[rows])
    assert ignored is None


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 4)])
def test_or_they_are_left_out(rows: slice) -> None:
    positives, ignored = pair_up(IMAGE, TEXT, rows, "ignored")
    assert torch.equal(positives, DIAGONAL[rows])
    assert ignored is not None
    assert torch.equal(ignored, (ALIKE & ~DIAGONAL)[rows])


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 4)])
def test_or_they_are_strangers(rows: slice) -> None:
    positives, ignored = pair_up(IMAGE, TEXT, rows, "negative")
    assert torch.equal(positives, DIAGONAL[rows])
    assert ignored is None


def test_an_unknown_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="same='both'; expected one of positive, ignored, negative; choose one"):
        pair_up(IMAGE, TEXT, slice(0, 4), "both")
