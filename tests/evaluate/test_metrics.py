"""Metrics of whole splits against scipy, scikit-learn and the cases where they are not defined."""

from __future__ import annotations

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, matthews_corrcoef

from lilt.evaluate.metrics import class_metrics, f1, matthews, mean_ranks, pearson, predicted, spearman


@pytest.mark.parametrize("levels", [3, 1000])
def test_correlations_are_those_of_scipy(levels: int) -> None:
    """Few levels tie often."""
    generator = torch.Generator().manual_seed(levels)
    x = torch.randint(levels, (200,), generator=generator).double()
    y = (x + levels * torch.randn(200, generator=generator)).round()
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert mean_ranks(y).tolist() == stats.rankdata(y).tolist()
    assert 0.2 < spearman(x, y) < 0.9
    assert spearman(x, -x) == pytest.approx(-1)


def test_what_is_always_the_same_correlates_with_nothing() -> None:
    same, other = torch.full((5,), 0.1), torch.arange(5.0)
    assert pearson(same, other) == spearman(other, same) == pearson(same[:1], other[:1]) == 0


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_class_metrics_are_those_of_scikit_learn(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (300,), generator=generator)
    scores = torch.randn(300, classes, generator=generator)
    scores[torch.arange(300), labels] += 0.7
    found = dict(class_metrics(scores, labels, classes))
    named = scores.argmax(1)
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, named))
    assert found["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(labels, named))
    assert found["matthews"] == pytest.approx(100 * matthews_corrcoef(labels, named))
    assert ("f1" in found) == (classes == 2)
    if classes == 2:
        assert found["f1"] == pytest.approx(100 * f1_score(labels, named))
        assert f1(named, labels, positive=0) == pytest.approx(f1_score(labels, named, pos_label=0))


def test_one_class_alone_says_nothing() -> None:
    zeros, ones = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    assert matthews(zeros, zeros, 2) == matthews(zeros, ones, 2) == 0
    assert f1(zeros, zeros) == 0
    assert f1(ones, ones) == 1


def test_ties_and_no_numbers_name_a_wrong_class() -> None:
    nan = float("nan")
    scores = torch.tensor([[1.0, 1.0, 0.0], [nan, nan, nan], [0.0, 2.0, 1.0], [3.0, nan, 1.0]])
    labels = torch.tensor([0, 0, 1, 0])
    found = dict(class_metrics(scores, labels, 3))
    assert found["top1"] == 25
    ranks = torch.tensor([2, 3, 1, 2])
    named = predicted(scores, labels, ranks)
    assert named[2] == 1
    assert all(named[i] != labels[i] for i in (0, 1, 3))
