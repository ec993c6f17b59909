"""Linear CKA against the formula with full Gram matrices, and what it must not see."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest
import torch
from torch import Tensor

from lilt.evaluate.cka import Moments


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_gram(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of linear kernels, centred by H = 1 - 1/n."""
    x, y = x.double(), y.double()
    h = torch.eye(len(x)).double() - 1 / len(x)
    k, l = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h  # noqa: E741
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


@pytest.mark.parametrize("batch", [1, 7, 50, 1000])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_batch_by_batch_it_is_the_formula_with_gram_matrices(batch: int, offset: float) -> None:
    x = rows(50, 8, 1) + offset
    y = x[:, :5] @ rows(5, 6, 2) + rows(50, 6, 3) - offset
    found = reduce(add, (Moments.of(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)))
    assert found.count == 50
    assert found.cka() == pytest.approx(by_gram(x, y), rel=1e-4)
    assert 0.05 < found.cka() < 0.95


def test_moments_are_those_of_all_rows() -> None:
    x, y = rows(31, 4, 1) * 3 + 2, rows(31, 3, 2) - 1
    found = Moments.of(x[:3], y[:3]) + Moments.of(x[3:20], y[3:20]) + Moments.of(x[20:], y[20:])
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    torch.testing.assert_close(found.means, (x.double().mean(0), y.double().mean(0)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.products, (a.T @ a, b.T @ b, a.T @ b), rtol=1e-4, atol=1e-3)


def test_rotation_scale_and_shift_are_no_drift() -> None:
    x = rows(60, 6, 1)
    turn, _ = torch.linalg.qr(rows(6, 6, 2))
    assert Moments.of(x, 3 * x @ turn + 5).cka() == pytest.approx(1, abs=1e-5)
    assert Moments.of(x, x).cka() == pytest.approx(1, abs=1e-6)
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert Moments.of(x, stretched).cka() < 0.9


def test_unrelated_rows_are_far_apart() -> None:
    assert Moments.of(rows(4000, 4, 1), rows(4000, 4, 2)).cka() < 0.01


def test_what_does_not_vary() -> None:
    flat = torch.ones(20, 3)
    assert Moments.of(flat, flat * 2).cka() == 1
    assert Moments.of(flat, rows(20, 3, 1)).cka() == 0
