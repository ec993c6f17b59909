"""Mutual nearest neighbours against slow loops, ties drawn in all possible ways among them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lilt.advise import Neighbours, mutual, neighbours


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def score(x: Tensor, y: Tensor, k: int) -> float:
    return mutual(Neighbours.of(x, k), Neighbours.of(y, k))


def draws(x: list[list[float]], i: int, k: int) -> list[set[int]]:
    """All sets of k that can be the nearest others of thing i, each as likely as the next."""
    size = [math.sqrt(sum(v * v for v in row)) for row in x]
    near = {
        j: sum(a * b for a, b in zip(x[i], x[j], strict=True)) / (size[i] * size[j]) for j in range(len(x)) if j != i
    }
    edge = sorted(near.values(), reverse=True)[k - 1]
    sure = {j for j, value in near.items() if value > edge + 1e-12}
    tied = [j for j, value in near.items() if abs(value - edge) <= 1e-12]
    return [sure | set(some) for some in itertools.combinations(tied, k - len(sure))]


def by_loops(x: Tensor, y: Tensor, k: int) -> float:
    """The mean share of common neighbours over things, and over all draws among equals of each side."""
    ours, theirs = x.double().tolist(), y.double().tolist()
    shares = []
    for i in range(len(ours)):
        pairs = itertools.product(draws(ours, i, k), draws(theirs, i, k))
        shares.append([len(a & b) / k for a, b in pairs])
    return 100 * sum(sum(some) / len(some) for some in shares) / len(shares)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
def test_it_is_the_loop(k: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "AT_ONCE", at_once)
    x = rows(40, 6, 1)
    y = x[:, :4] + rows(40, 4, 2)
    assert score(x, y, k) == pytest.approx(by_loops(x, y, k), abs=1e-9)
    assert 100 * k / 39 < score(x, y, k) < 90


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_are_drawn_and_not_agreed_on(k: int) -> None:
    # small whole numbers: many cosines are equal, some of them beside the edge
    x = torch.randint(1, 4, (14, 3), generator=torch.Generator().manual_seed(3)).float()
    y = torch.randint(1, 3, (14, 3), generator=torch.Generator().manual_seed(4)).float()
    assert max(len(draws(x.tolist(), i, k)) for i in range(14)) > 1
    wide = [Neighbours.of(z, k) for z in (x, y)]
    known = ~(wide[0].lost | wide[1].lost)
    assert known.any()
    found = [
        sum(len(a & b) for a, b in itertools.product(draws(x.tolist(), i, k), draws(y.tolist(), i, k)))
        / (k * len(draws(x.tolist(), i, k)) * len(draws(y.tolist(), i, k)))
        for i in range(14)
    ]
    shares = [share if good else k / 13 for share, good in zip(found, known.tolist(), strict=True)]
    assert mutual(*wide) == pytest.approx(100 * sum(shares) / 14, abs=1e-9)
    if k == 4:  # 4 k candidates are all others here, so nothing is lost
        assert known.all() and mutual(*wide) == pytest.approx(by_loops(x, y, k), abs=1e-9)


def test_the_weights_of_a_thing_add_up_to_its_neighbours() -> None:
    x = torch.cat([rows(20, 3, 1), rows(20, 3, 1)[:6]])  # six are there twice
    found = Neighbours.of(x, 5)
    torch.testing.assert_close(found.weight.sum(1), torch.full((26,), 5.0).double())
    assert all(i not in row for i, row in enumerate(found.which.tolist()))


@pytest.mark.parametrize("k", [1, 10])
def test_what_sees_alike_agrees_in_full(k: int) -> None:
    x = rows(100, 8, 1)
    turn, _ = torch.linalg.qr(rows(8, 8, 2).double())
    assert score(x, x, k) == 100
    assert score(x, (3 * x.double() @ turn), k) == 100
    y = rows(100, 5, 3)
    assert score(x, y, k) == pytest.approx(score(7 * x.double() @ turn, y / 9, k), abs=1e-9)


def test_the_order_of_the_pairs_and_of_the_two_does_not_matter() -> None:
    x, y = rows(80, 6, 1), rows(80, 9, 2) + rows(80, 1, 3)
    x[40:60] = x[:20]  # ties
    order = torch.randperm(80, generator=torch.Generator().manual_seed(5))
    assert score(x[order], y[order], 7) == pytest.approx(score(x, y, 7), abs=1e-9)
    assert score(y, x, 7) == pytest.approx(score(x, y, 7), abs=1e-9)
    assert abs(score(x[order], y, 7) - score(x, y, 7)) > 1e-3  # other pairs are another question


def test_what_is_unrelated_agrees_by_chance() -> None:
    x, y = rows(1500, 16, 1), rows(1500, 16, 2)
    found = Neighbours.of(x, 10)
    assert found.chance == 10 / 1499
    # 15,000 draws at 0.67 % : standard error 0.07 %
    assert score(x, y, 10) == pytest.approx(100 * found.chance, abs=0.3)


def test_what_sees_everything_alike_says_nothing() -> None:
    flat, x = torch.ones(60, 4), rows(60, 4, 1)
    assert Neighbours.of(flat, 5).lost.all()
    for other in (flat, x):  # two towers that have both collapsed do not agree either
        assert score(flat, other, 5) == pytest.approx(100 * 5 / 59)
    assert score(torch.zeros(60, 4), x, 5) == pytest.approx(100 * 5 / 59)


def test_memory_is_linear_in_the_pairs() -> None:
    found = Neighbours.of(rows(600, 8, 1), 10)
    assert found.which.shape == found.weight.shape == (600, 10)
    assert found.which.untyped_storage().nbytes() == 8 * 600 * 10


@pytest.mark.parametrize(("count", "k"), [(11, 10), (3, 2), (5, 0)])
def test_too_few_things_are_refused(count: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} neighbours among {count} things: expected at least 1, and at least"):
        Neighbours.of(rows(count, 3, 1), k)
