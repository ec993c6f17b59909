"""softmax_contrastive against a loop written from the formula, finite differences and open_clip."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from lilt.losses import softmax_contrastive
from tests.losses import batches

G = 6
EVERY = slice(0, G)


def unit(seed: int, rows: int = G, requires_grad: bool = False) -> Tensor:
    return batches.unit(seed, rows, requires_grad=requires_grad)


def scale() -> Tensor:
    return torch.tensor(7.3, dtype=torch.float64, requires_grad=True)


def relations(seed: int) -> dict[str, Any]:
    """Several positives a row, some pairs left out, two rows that are not real."""
    generator = torch.Generator().manual_seed(seed)
    positives = torch.eye(G, dtype=torch.bool) | (torch.rand(G, G, generator=generator) < 0.2)
    ignored = torch.rand(G, G, generator=generator) < 0.2
    valid = torch.tensor([True, True, False, True, True, False])
    return {"positives": positives, "ignored": ignored, "valid": valid}


def slow(
    image: Tensor, text: Tensor, factor: Tensor, rows: slice, positives: Any, ignored: Any, valid: Any, smoothing: float
) -> float:
    """The mean over our valid rows and both directions of -sum_j q_j log(exp(s_j) / sum over what takes part)."""
    total = 0.0
    wanted = range(rows.start, rows.stop)
    for ours, theirs in ((image, text), (text, image)):
        for i, place in enumerate(wanted):
            if not valid[place]:
                continue
            chosen = [j for j in range(len(image)) if positives[i][j] and valid[j]]
            part = [j for j in range(len(image)) if valid[j] and (positives[i][j] or not ignored[i][j])]
            score = {j: float(factor) * sum(float(x) for x in ours[place] * theirs[j]) for j in part}
            below = sum(math.exp(s) for s in score.values())
            cost = {j: -math.log(math.exp(score[j]) / below) for j in part}
            total += (1 - smoothing) * sum(cost[j] for j in chosen) / len(chosen) / 2
            total += smoothing * sum(cost.values()) / len(part) / 2
    share = sum(valid) * (rows.stop - rows.start) / len(image)
    return total / float(share)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("rows", [EVERY, slice(0, 3), slice(3, 6)])
def test_the_value_is_the_formula(seed: int, rows: slice, smoothing: float) -> None:
    image, text, factor, facts = unit(seed), unit(seed + 50), scale(), relations(seed)
    ours = {name: facts[name][rows] for name in ("positives", "ignored")} | {"valid": facts["valid"]}
    loss, _ = softmax_contrastive(image, text, factor, rows=rows, smoothing=smoothing, **ours)
    positives, ignored, valid = (ours[name].tolist() for name in ("positives", "ignored", "valid"))
    expected = slow(image, text, factor.detach(), rows, positives, ignored, valid, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("rows", [EVERY, slice(2, 5)])
def test_the_gradient_is_that_of_finite_differences(rows: slice, smoothing: float) -> None:
    facts = relations(1)

    def loss(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
        ours = {"positives": facts["positives"][rows], "ignored": facts["ignored"][rows], "valid": facts["valid"]}
        return softmax_contrastive(image, text, factor, rows=rows, smoothing=smoothing, **ours)[0]

    assert torch.autograd.gradcheck(loss, (unit(3, requires_grad=True), unit(4, requires_grad=True), scale()))


def test_open_clip_agrees_in_value_and_gradient() -> None:
    image, text, factor = unit(5, 8, True), unit(6, 8, True), scale()
    ours = softmax_contrastive(image, text, factor, rows=slice(0, 8))[0]
    theirs = ClipLoss()(image, text, factor)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    given = torch.autograd.grad(ours, (image, text, factor))
    for mine, other in zip(given, torch.autograd.grad(theirs, (image, text, factor)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


def test_torch_agrees_on_smoothing() -> None:
    image, text, factor = unit(5, 8, True), unit(6, 8, True), scale()
    ours = softmax_contrastive(image, text, factor, rows=slice(0, 8), smoothing=0.1)[0]
    logits = factor * image @ text.T
    own = torch.arange(8)
    theirs = sum((F.cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)), torch.zeros(())) / 2
    batches.close(
        [ours, *torch.autograd.grad(ours, (image, text, factor))],
        [theirs, *torch.autograd.grad(theirs, (image, text, factor))],
    )


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("bad", [(), (2, 5), (0, 1, 2, 3, 5), (1, 2, 4, 5)])
def test_the_mean_over_ranks_is_the_loss_of_the_joint_batch(world: int, bad: tuple[int, ...]) -> None:
    image, text, factor, facts = unit(7, requires_grad=True), unit(8, requires_grad=True), scale(), relations(2)
    valid = torch.tensor([i not in bad for i in range(G)])
    names = ("positives", "ignored")
    joint, parts = softmax_contrastive(image, text, factor, rows=EVERY, valid=valid, **{k: facts[k] for k in names})
    shares = []
    for rank in range(world):
        rows = slice(rank * G // world, (rank + 1) * G // world)
        ours = {k: facts[k][rows] for k in names}
        shares.append(softmax_contrastive(image, text, factor, rows=rows, valid=valid, **ours))
    mean: Tensor = sum((loss for loss, _ in shares), torch.zeros((), dtype=torch.float64)) / world
    torch.testing.assert_close(mean, joint, rtol=1e-12, atol=1e-14)
    for name in parts:
        assert sum(p[name].item() for _, p in shares) / world == pytest.approx(parts[name].item(), rel=1e-12, abs=1e-14)
    for mine, other in zip(*(torch.autograd.grad(x, (image, text, factor)) for x in (mean, joint)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("ignore", [False, True])
def test_an_invalid_row_is_as_if_it_were_not_there(ignore: bool) -> None:
    image, text, factor = unit(9, requires_grad=True), unit(10, requires_grad=True), scale()
    # pair 2 is alike with every other pair: once its image is missing nothing is left in its row
    alike = torch.zeros(G, G, dtype=torch.bool)
    alike[2], alike[:, 2] = True, True
    ignored = alike if ignore else None
    kept = [i for i in range(G) if i != 2]
    valid = torch.arange(G) != 2
    full = softmax_contrastive(image, text, factor, rows=EVERY, ignored=ignored, valid=valid)[0]
    less = softmax_contrastive(image[kept], text[kept], factor, rows=slice(0, G - 1))[0]
    torch.testing.assert_close(full, less, rtol=1e-12, atol=0)
    for mine, other in zip(*(torch.autograd.grad(x, (image, text, factor)) for x in (full, less)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


def test_a_batch_without_a_real_row_is_zero_with_zero_gradient() -> None:
    image, text, factor = unit(11, requires_grad=True), unit(12, requires_grad=True), scale()
    loss = softmax_contrastive(image, text, factor, rows=EVERY, valid=torch.zeros(G, dtype=torch.bool))[0]
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, (image, text, factor)))


def test_ignoring_a_pair_removes_its_pull() -> None:
    image, text, factor, rows = unit(13), unit(14), scale(), slice(0, 4)
    ignored = torch.zeros(4, G, dtype=torch.bool)
    ignored[:, 4] = True
    changed = torch.cat([text[:4], unit(99)[:1], text[5:]])

    def image_to_text(captions: Tensor, left_out: Tensor | None) -> Tensor:
        return softmax_contrastive(image, captions, factor, rows=rows, ignored=left_out)[1]["image_to_text"]

    assert image_to_text(text, ignored) == image_to_text(changed, ignored)
    assert image_to_text(text, None) != image_to_text(changed, None)


def test_the_default_positives_follow_the_rows() -> None:
    image, text, factor, rows = unit(15), unit(16), scale(), slice(2, 4)
    own = torch.eye(G, dtype=torch.bool)[rows]
    default = softmax_contrastive(image, text, factor, rows=rows)[0]
    assert default == softmax_contrastive(image, text, factor, rows=rows, positives=own)[0]


def test_a_row_without_a_positive_is_an_error() -> None:
    positives = torch.eye(G, dtype=torch.bool)
    positives[3] = False
    with pytest.raises(ValueError, match=r"a row of the batch has no positive; each valid row needs .*check"):
        softmax_contrastive(unit(1), unit(2), scale(), rows=EVERY, positives=positives)
    valid = torch.arange(G) != 3  # unless the row is not real
    assert softmax_contrastive(unit(1), unit(2), scale(), rows=EVERY, positives=positives, valid=valid)[0].isfinite()
