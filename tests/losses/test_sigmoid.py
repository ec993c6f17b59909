"""sigmoid_contrastive against a loop written from the formula, finite differences and open_clip."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from lilt.losses import sigmoid_contrastive
from tests.losses.batches import Joint, chunked, close, joint, related, scalar, unit

FULL = chunked("sigmoid", None)


def slow(batch: Joint, rows: slice, smoothing: float = 0.0) -> tuple[float, float]:
    """The sums over positives and over negatives of the cross-entropies, a valid row of the joint batch."""
    positive, out, real = related(batch.relation)
    scale, bias = batch.scale.item(), batch.bias.item()
    sums = [0.0, 0.0]
    image, text = batch.image.detach(), batch.text.detach()
    for i in range(rows.start, rows.stop):
        for j in range(len(real)):
            if real[i] and not out[i][j]:
                product = sum(float(x) for x in image[i] * text[j])
                sign = 1 if positive[i][j] else -1
                logit = scale * product + bias
                yes, no = -math.log(1 + math.exp(-sign * logit)), -math.log(1 + math.exp(sign * logit))
                sums[sign < 0] -= (1 - smoothing / 2) * yes + smoothing / 2 * no
    ours = sum(real) * (rows.stop - rows.start) / len(real)
    return sums[0] / ours, sums[1] / ours


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rows", [slice(0, 12), slice(0, 4), slice(6, 12)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_value_and_parts_are_the_formula(seed: int, rows: slice, smoothing: float) -> None:
    batch = joint(seed)
    loss, parts = batch.run(chunked(f"sigmoid(smoothing={smoothing})", None), rows)
    near, far = slow(batch, rows, smoothing)
    assert loss.item() == pytest.approx(near + far, rel=1e-12)
    assert parts["positive"].item() == pytest.approx(near, rel=1e-12)
    assert parts["negative"].item() == pytest.approx(far, rel=1e-12)


@pytest.mark.parametrize("rows", [slice(0, 12), slice(3, 9)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_gradient_is_that_of_finite_differences(rows: slice, smoothing: float) -> None:
    batch = joint(1)
    smooth = chunked(f"sigmoid(smoothing={smoothing})", None)

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return Joint(image, text, batch.relation, scale, bias).run(smooth, rows)[0]

    assert torch.autograd.gradcheck(loss, (batch.image, batch.text, batch.scale, batch.bias))


def test_open_clip_agrees_in_value_and_gradient() -> None:
    learned = (unit(5, 8), unit(6, 8), scalar(10.0), scalar(-10.0))
    ours = sigmoid_contrastive(*learned, rows=slice(0, 8))[0]
    theirs = SigLipLoss()(*learned)
    close([ours, *torch.autograd.grad(ours, learned)], [theirs, *torch.autograd.grad(theirs, learned)])


def test_a_row_without_a_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a row of the batch has no positive; each valid row needs .*check"):
        sigmoid_contrastive(
            unit(1, 4), unit(2, 4), scalar(1), scalar(0), rows=slice(0, 4), positives=torch.zeros(4, 4) > 0
        )


def test_at_the_start_the_negatives_weigh_little() -> None:
    """Scale 10 and bias -10: what the paper starts from keeps the first steps from undoing the towers."""
    image, text = unit(7, 64), unit(8, 64)
    assert FULL.scale_start is not None and FULL.bias_start is not None
    cheap = sigmoid_contrastive(image, text, scalar(FULL.scale_start), scalar(FULL.bias_start), rows=slice(0, 64))[1]
    dear = sigmoid_contrastive(image, text, scalar(FULL.scale_start), scalar(0.0), rows=slice(0, 64))[1]
    assert cheap["negative"] < cheap["positive"] < dear["negative"]
