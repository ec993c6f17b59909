"""CKA of two layers against Gram matrices, and its chance against all orders."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilt.advise import Match, View, match
from tests.advise.test_neighbours import rows
from tests.evaluate.test_cka import by_gram


def compared(x: Tensor, y: Tensor, k: int = 3) -> Match:
    return match(View.of("1 of 2", x, k), View.of("output", y, k))


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_cka_is_the_formula_with_gram_matrices(offset: float) -> None:
    x = rows(60, 8, 1) + offset
    y = x[:, :5] @ rows(5, 6, 2) + rows(60, 6, 3) - offset
    found = compared(x, y)
    assert found.cka == pytest.approx(by_gram(x, y), rel=1e-4)
    assert 0.05 < found.cka < 0.95
    assert (found.vision_layer, found.text_layer) == ("1 of 2", "output")


def test_rotation_scale_and_order_are_no_difference() -> None:
    x, y = rows(60, 6, 1), rows(60, 4, 2) + rows(60, 1, 3)
    turn, _ = torch.linalg.qr(rows(6, 6, 4))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    assert compared(x, 3 * x @ turn).cka == pytest.approx(1, abs=1e-5)
    before = compared(x, y)
    for after in (compared(2 * x @ turn, y / 5), compared(x[order], y[order])):
        assert after.cka == pytest.approx(before.cka, rel=1e-4)
        assert after.cka_chance == pytest.approx(before.cka_chance, rel=1e-4)
        assert after.mutual_knn == pytest.approx(before.mutual_knn, abs=1e-9)


def test_the_chance_is_the_mean_over_all_ways_to_pair() -> None:
    x, y = rows(6, 3, 1), rows(6, 2, 2)
    every = [by_gram(x, y[list(order)]) for order in itertools.permutations(range(6))]
    assert compared(x, y).cka_chance == pytest.approx(sum(every) / len(every), rel=1e-5)


def test_few_pairs_for_their_width_look_alike_by_chance() -> None:
    few = compared(rows(50, 40, 1), rows(50, 40, 2))
    many = compared(rows(2000, 40, 1), rows(2000, 40, 2))
    assert few.cka == pytest.approx(few.cka_chance, abs=0.1) and few.cka_chance > 0.3
    assert many.cka_chance < 0.03


def test_what_does_not_vary() -> None:
    flat = torch.ones(20, 3)
    assert (compared(flat, rows(20, 3, 1)).cka, compared(flat, rows(20, 3, 1)).cka_chance) == (0, 0)


def test_what_is_not_a_number_is_refused() -> None:
    x = rows(20, 3, 1)
    x[4, 1] = torch.nan
    with pytest.raises(ValueError, match="features of output are not finite for 1 of 20 things; expected numbers"):
        View.of("output", x, 3)
