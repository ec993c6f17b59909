"""Accuracies against a loop over images and classes."""

from __future__ import annotations

import pytest
import torch

from lilt.evaluate.accuracy import accuracy, right_ranks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [2, 5, 6, 11])
def test_ranks_and_accuracies_are_those_of_a_slow_loop(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(7, (40, classes), generator=generator).double()  # with many ties
    labels = torch.randint(max(2, classes - 1), (40,), generator=generator)  # the last class may never occur
    expected = []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        expected.append(1 + sum(row[c] >= row[label] for c in range(classes) if c != label))
    ranks = right_ranks(scores, labels)
    assert ranks.tolist() == expected
    found = dict(accuracy(ranks, labels, classes))
    assert found["top1"] == pytest.approx(100 * sum(r == 1 for r in expected) / 40)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        assert found["top5"] == pytest.approx(100 * sum(r <= 5 for r in expected) / 40)
    shares = []
    for label in set(labels.tolist()):
        own = [r == 1 for r, other in zip(expected, labels.tolist(), strict=True) if other == label]
        shares.append(sum(own) / len(own))
    assert found["mean_per_class"] == pytest.approx(100 * sum(shares) / len(shares))


def test_a_rare_class_counts_as_much_as_a_frequent_one() -> None:
    ranks, labels = torch.tensor([1] * 9 + [2]), torch.tensor([0] * 9 + [1])
    assert dict(accuracy(ranks, labels, 2)) == {"top1": 90.0, "mean_per_class": 50.0}


def test_what_says_the_same_of_all_classes_or_no_number_knows_nothing() -> None:
    right = torch.arange(4)
    assert right_ranks(torch.ones(4, 4), right).tolist() == [4] * 4
    assert right_ranks(torch.full((4, 4), float("nan")), right).tolist() == [4] * 4
    one = torch.eye(4)
    one[1, 1] = float("nan")
    assert right_ranks(one, right).tolist() == [1, 4, 1, 1]
