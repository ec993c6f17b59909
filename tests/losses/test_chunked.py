"""The chunked forms against the full ones and finite differences, and what they hold in memory."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses.batches import SPECS, Joint, chunked, close, joint

every_loss = pytest.mark.parametrize("spec", SPECS)


@every_loss
@pytest.mark.parametrize("seed", range(12))
def test_value_and_gradient_are_those_of_the_full_form(spec: str, seed: int) -> None:
    draw = random.Random(seed)
    total = draw.randint(1, 24)
    batch = joint(seed, total, padded=draw.random() < 0.7)
    start = draw.randrange(total)
    for rows in (slice(0, total), slice(start, draw.randint(start + 1, total))):
        expected = batch.everything(chunked(spec, None), rows)
        for chunk in {1, draw.randint(1, total), total, total + 3}:
            close(batch.everything(chunked(spec, chunk), rows), expected)


@every_loss
@pytest.mark.parametrize("rows", [slice(0, 5), slice(1, 4)])
def test_the_gradient_is_that_of_finite_differences(spec: str, rows: slice) -> None:
    batch, loss = joint(4, 5), chunked(spec, 3)

    def value(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return Joint(image, text, batch.relation, scale, bias).run(loss, rows)[0]

    assert torch.autograd.gradcheck(value, (batch.image, batch.text, batch.scale, batch.bias))


@every_loss
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("world", [2, 3])
def test_the_mean_over_ranks_is_the_joint_batch(spec: str, chunk: int | None, world: int) -> None:
    loss = chunked(spec, chunk)
    for seed in range(3):
        batch = joint(seed)
        size = 12 // world
        ranks = [batch.everything(loss, slice(rank * size, (rank + 1) * size)) for rank in range(world)]
        means = [torch.stack(values).mean(0) for values in zip(*ranks, strict=True)]
        close(means, batch.everything(loss))


@every_loss
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_batch_without_a_real_row_is_zero_with_zero_gradient(spec: str, chunk: int | None) -> None:
    batch = joint(2)
    empty = replace(batch, relation=replace(batch.relation, valid=torch.zeros(12, dtype=torch.bool)))
    assert all(value.abs().max() == 0 for value in empty.everything(chunked(spec, chunk)))


@every_loss
@pytest.mark.parametrize("chunk", [None, 4])
def test_padding_may_hold_anything(spec: str, chunk: int | None) -> None:
    batch, loss = joint(3), chunked(spec, chunk)
    valid = batch.relation.valid
    assert valid is not None and not valid.all()
    kept = valid.nonzero().squeeze(1)
    ids = batch.relation.image_id[kept], batch.relation.text_id[kept]
    image, text = (x[kept].detach().requires_grad_() for x in (batch.image, batch.text))
    less = replace(
        batch, image=image, text=text, relation=replace(batch.relation, image_id=ids[0], text_id=ids[1], valid=None)
    )
    full, expected = batch.everything(loss), less.everything(loss)
    gradients = len(full) - len(batch.learned(loss))
    for place in (gradients, gradients + 1):
        assert full[place][~valid].abs().max() == 0
        full[place] = full[place][valid]
    close(full, expected)


@every_loss
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("factor", [100.0, 1e4])
def test_a_large_scale_overflows_nowhere(spec: str, chunk: int | None, factor: float) -> None:
    """In fp32, with an image that equals its text and one that is its opposite."""
    batch, loss = joint(5), chunked(spec, chunk)
    image = batch.image.detach().float()
    text = torch.cat([image[:2], -image[2:4], batch.text[4:].float()])

    def learned(dtype: torch.dtype) -> Joint:
        values = (image, text, torch.tensor(factor), torch.tensor(-10.0))
        image_, text_, scale, bias = (x.detach().to(dtype).requires_grad_() for x in values)
        return Joint(image_, text_, batch.relation, scale, bias)

    single, double = learned(torch.float32), learned(torch.float64)
    for mine, exact in zip(single.everything(loss), double.everything(loss), strict=True):
        assert mine.dtype == torch.float32 and mine.isfinite().all()
        # a logit of 1e4 is known to 1e-3 in fp32, and its exponential no better
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6 * factor, atol=1e-6 * factor)


@every_loss
@pytest.mark.parametrize("chunk", [None, 4])
def test_autocast_changes_nothing(spec: str, chunk: int | None) -> None:
    batch, loss = joint(6), chunked(spec, chunk)
    batch = replace(batch, image=batch.image.float(), text=batch.text.float())
    expected = batch.everything(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, parts = batch.run(loss)
        if chunk is not None:  # its backward pass is ours, wherever it is called
            gradients = torch.autograd.grad(value, batch.learned(loss), retain_graph=True)
            close(gradients, expected[-len(gradients) :], 0)
    gradients = torch.autograd.grad(value, batch.learned(loss))
    close([value.detach(), *parts.values(), *gradients], expected, 0)


@every_loss
@pytest.mark.parametrize("chunk", [None, 4])
def test_half_embeddings_are_compared_in_full(spec: str, chunk: int | None) -> None:
    batch, loss = joint(7), chunked(spec, chunk)
    half = replace(batch, image=batch.image.bfloat16(), text=batch.text.bfloat16())
    whole = replace(batch, image=half.image.float(), text=half.text.float())
    (value, _), (expected, _) = half.run(loss), whole.run(loss)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert torch.autograd.grad(value, half.image)[0].dtype == torch.bfloat16


@every_loss
@pytest.mark.parametrize("side", ["image", "text"])
def test_one_side_may_be_without_a_gradient(spec: str, side: str) -> None:
    batch = joint(8)
    frozen = replace(batch, **{side: getattr(batch, side).detach()})
    other = frozen.text if side == "image" else frozen.image
    made = [torch.autograd.grad(frozen.run(chunked(spec, chunk))[0], other) for chunk in (None, 5)]
    close(made[1], made[0])
    with torch.no_grad():
        assert torch.equal(frozen.run(chunked(spec, 5))[0], batch.run(chunked(spec, 5))[0].detach())


class Live(TorchDispatchMode):
    """Count the bytes of all tensors made under it that are still there, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def drop(self, key: int, size: int) -> None:
        self.now -= size
        self.known.remove(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made


@every_loss
def test_memory_is_linear_in_the_batch(spec: str) -> None:
    chunk, kept, most = 16, {}, {}
    for form in (None, chunk):
        for total in (96, 192):
            batch, loss = joint(9, total, same="ignored"), chunked(spec, form)
            with Live() as live:
                value, _ = batch.run(loss)
                kept[form, total] = live.now
                torch.autograd.grad(value, batch.learned(loss))
            most[form, total] = live.most
    for bytes_ in (kept, most):
        assert bytes_[chunk, 192] <= 2.05 * bytes_[chunk, 96]
        assert bytes_[None, 192] > 3 * bytes_[None, 96]
    # 12 tiles and 12 times the embeddings at most, and between the passes 32 numbers a row
    assert most[chunk, 192] <= 8 * 12 * (chunk * chunk + 192 * 5)
    assert kept[chunk, 192] <= 8 * 32 * 192
