"""hinge_ranking against a loop written from the formula, finite differences and torch's own multi-class margin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.losses import hinge_ranking
from tests.losses.batches import Joint, chunked, close, joint, related, unit

MARGIN = 0.5
both = pytest.mark.parametrize("hardest", [False, True])


def slow(batch: Joint, rows: slice, hardest: bool) -> float:
    """The mean over our valid rows and both directions of the sum or the largest of max(0, margin - s_p + s_n)."""
    positive, out, real = related(batch.relation)
    total = 0.0
    image, text = batch.image.detach(), batch.text.detach()
    for ours, theirs in ((image, text), (text, image)):
        for i in range(rows.start, rows.stop):
            if not real[i]:
                continue
            near = min(float(ours[i] @ theirs[j]) for j in range(len(real)) if positive[i][j])
            far = [j for j in range(len(real)) if not positive[i][j] and not out[i][j]]
            costs = [max(0.0, MARGIN - near + float(ours[i] @ theirs[j])) for j in far]
            total += (max(costs, default=0.0) if hardest else sum(costs)) / 2
    return total / (sum(real) * (rows.stop - rows.start) / len(real))


@both
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rows", [slice(0, 12), slice(0, 4), slice(6, 12)])
def test_the_value_is_the_formula(seed: int, rows: slice, hardest: bool) -> None:
    batch = joint(seed)
    loss, _ = batch.run(chunked(f"hinge(margin={MARGIN},hardest={hardest})", None), rows)
    assert loss.item() == pytest.approx(slow(batch, rows, hardest), rel=1e-12)


@both
@pytest.mark.parametrize("rows", [slice(0, 12), slice(3, 9)])
def test_the_gradient_is_that_of_finite_differences(rows: slice, hardest: bool) -> None:
    batch = joint(1)
    rule = chunked(f"hinge(margin={MARGIN},hardest={hardest})", None)

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return Joint(image, text, batch.relation, batch.scale, batch.bias).run(rule, rows)[0]

    assert torch.autograd.gradcheck(loss, (batch.image, batch.text))


def test_torch_agrees_in_value_and_gradient() -> None:
    learned = unit(5, 8), unit(6, 8)
    ours = hinge_ranking(*learned, rows=slice(0, 8), margin=MARGIN)[0]
    cosines, own = learned[0] @ learned[1].T, torch.arange(8)
    # torch divides by the number of classes
    theirs = 8 * sum((F.multi_margin_loss(x, own, margin=MARGIN) for x in (cosines, cosines.T)), torch.zeros(())) / 2
    close([ours, *torch.autograd.grad(ours, learned)], [theirs, *torch.autograd.grad(theirs, learned)])


@both
def test_nothing_is_paid_once_all_positives_are_ahead(hardest: bool) -> None:
    """Two images with two captions each, at right angles: 1 - 0 beats a margin of 0.9, but not one of 1.1."""
    image = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0)
    alike = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)) > 0
    losses = [
        hinge_ranking(image, image, rows=slice(0, 4), positives=alike, margin=margin, hardest=hardest)[0].item()
        for margin in (0.9, 1.1)
    ]
    assert losses == pytest.approx([0, 0.1 if hardest else 0.2], abs=1e-12)


@both
def test_a_row_without_negatives_costs_nothing(hardest: bool) -> None:
    image, text = unit(1, 3), unit(2, 3)
    loss = hinge_ranking(image, text, rows=slice(0, 3), positives=torch.ones(3, 3) > 0, hardest=hardest)[0]
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, (image, text)))


def test_a_row_without_a_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a row of the batch has no positive; each valid row needs .*check"):
        hinge_ranking(unit(1, 4), unit(2, 4), rows=slice(0, 4), positives=torch.eye(4) > 1)
