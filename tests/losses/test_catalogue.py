"""Losses as a user writes them."""

from __future__ import annotations

import pytest
import torch

from lilt.losses import Hinge, Loss, Sigmoid, Softmax, build_loss, losses
from tests.losses.batches import SPECS, joint

SPOKEN = {
    "softmax": Softmax(),
    "softmax(smoothing=0.1,chunk=4096)": Softmax(smoothing=0.1, chunk=4096),
    "softmax(0.1,4096)": Softmax(smoothing=0.1, chunk=4096),
    "sigmoid": Sigmoid(),
    "sigmoid(chunk=4096)": Sigmoid(chunk=4096),
    "sigmoid(0.1,4096)": Sigmoid(smoothing=0.1, chunk=4096),
    "hinge(margin=0.3,hardest=true,chunk=none)": Hinge(margin=0.3, hardest=True),
}
WRONG = {
    "sigmiod": "unknown loss 'sigmiod'; known: hinge, sigmoid, softmax. Did you mean 'sigmoid'?",
    "softmax(smooth=0.1)": "softmax has no option 'smooth'; it takes: smoothing, chunk. Did you mean 'smoothing'?",
    "softmax(smoothing=1)": "softmax: smoothing=1.0; expected a share .* below 1; give 0.1",
    "softmax(smoothing=-0.1)": "softmax: smoothing=-0.1; expected a share",
    "sigmoid(smoothing=1.5)": "sigmoid: smoothing=1.5; expected a share",
    "sigmoid(chunk=0)": "chunk=0; expected at least 1 row at a time; give 1024, or none",
    "hinge(margin=0)": "hinge: margin=0.0; expected a distance of cosines, above 0 and at most 2; give 0.2",
    "hinge(hardest=yes)": "hinge: hardest=yes is not a truth value; write true or false",
}


@pytest.mark.parametrize("spec", SPOKEN)
def test_a_spec_is_a_loss(spec: str) -> None:
    assert build_loss(spec) == SPOKEN[spec]


@pytest.mark.parametrize("spec", WRONG)
def test_a_wrong_spec_says_what_to_write(spec: str) -> None:
    with pytest.raises(ValueError, match=WRONG[spec].replace("(", r"\(").replace("?", r"\?")):
        build_loss(spec)


def test_every_loss_is_tested() -> None:
    assert {spec.partition("(")[0] for spec in SPECS} == set(losses.names())


def test_losses_say_what_they_learn() -> None:
    learned = {name: (cls().scale_start, cls().bias_start) for name, cls in ((n, losses[n]) for n in losses.names())}
    assert learned == {"softmax": (1 / 0.07, None), "sigmoid": (10.0, -10.0), "hinge": (None, None)}
    assert [(x.needs_scale, x.needs_bias) for x in (Softmax(), Sigmoid(), Hinge())] == [
        (True, False), (True, True), (False, False),
    ]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_loss_uses_what_it_says_and_nothing_else(spec: str) -> None:
    batch, loss = joint(1), build_loss(spec)
    value = loss(
        batch.image, batch.text, batch.scale, batch.bias, rows=slice(0, 12), relation=batch.relation
    )[0]  # fmt: skip
    used = torch.autograd.grad(value, (batch.scale, batch.bias), allow_unused=True)
    assert [gradient is not None for gradient in used] == [loss.needs_scale, loss.needs_bias]


@pytest.mark.parametrize("loss", [Softmax(), Sigmoid(), Sigmoid(chunk=2)], ids=str)
@pytest.mark.parametrize("missing", ["scale", "bias"])
def test_a_missing_scalar_is_named(loss: Loss, missing: str) -> None:
    batch = joint(1)
    scalars = {"scale": batch.scale, "bias": batch.bias, missing: None}
    if missing == "bias" and not loss.needs_bias:
        loss(batch.image, batch.text, **scalars, rows=slice(0, 12), relation=batch.relation)
        return
    with pytest.raises(ValueError, match=f"came without a {missing}; expected a learned scalar; pass the model's"):
        loss(batch.image, batch.text, **scalars, rows=slice(0, 12), relation=batch.relation)


@pytest.mark.parametrize("spec", [*SPECS, *(f"{name}(chunk=2)" for name in losses.names())])
def test_identities_of_another_batch_are_an_error(spec: str) -> None:
    batch, loss = joint(1), build_loss(spec)
    with pytest.raises(
        ValueError, match=r"12 identities came with 10 embeddings; expected one per row .*; gather both"
    ):
        loss(batch.image[:10], batch.text[:10], batch.scale, batch.bias, rows=slice(0, 10), relation=batch.relation)
