"""What a tower was trained to say: its own features, tuned or not, read by its model's original classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lilt.towers.base import Inputs, Tower
from lilt.towers.classifier import Classifier


def original_logits(classifier: Classifier, tower: Tower, images: Inputs) -> Tensor:
    """Return the logits (B, classes) that the classifier's last layer gives for the features of a tower.

    Everything before that layer is the tower's, as it stands now. Raises ValueError where the two cannot be joined.
    """
    body: Any = classifier.body
    try:
        raw = tower.run(images)
        if hasattr(body, "get_classifier"):  # timm
            last = body.get_classifier()
            # two heads of a distilled model: each reads its own token, and the mean of both is the answer
            if isinstance(last, tuple):
                raise ValueError("it has two classifiers, each on a token of its own")
            return last(tower.own(raw, images))
        backbone = getattr(body, getattr(body, "base_model_prefix", ""), None)
        if not isinstance(backbone, nn.Module) or backbone is body:
            raise ValueError(f"{type(body).__name__} does not say where its features end")
        with _saying(backbone, raw):
            return classifier(images)
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError) as error:
        raise _unfit(classifier, tower, str(error)) from error


@torch.no_grad()
def prove_fit(classifier: Classifier, base: Tower) -> None:
    """Raise ValueError unless a tower without its policy, read by the classifier, says what the whole model says."""
    example = base.example()
    assert isinstance(example, Tensor)
    noise = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(base.parameters()).device)
    said, expected = original_logits(classifier, base, noise), classifier(noise)
    if said.shape != expected.shape or not torch.allclose(said, expected, rtol=1e-3, atol=1e-3 * _spread(expected)):
        raise _unfit(classifier, base, "its logits are not those of the whole model")


def _spread(logits: Tensor) -> float:
    return float(logits.std()) if logits.numel() > 1 else float(logits.abs().max())


def _unfit(classifier: Classifier, tower: Tower, why: str) -> ValueError:
    kind = type(classifier.body).__name__
    return ValueError(
        f"the vision tower {tower.spec!r} cannot be read by the classifier of {kind}: {why}. Expected all blocks of "
        "the same timm or transformers model; leave out layers, or give the spec of the model that the tower is from"
    )


@contextmanager
def _saying(backbone: nn.Module, raw: Any) -> Iterator[None]:
    """Let a module answer every call with what another has said."""
    backbone.forward = lambda *_, **__: raw  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backbone.forward
