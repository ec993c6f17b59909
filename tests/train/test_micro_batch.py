"""Micro-batches: the gradient of the whole batch with the memory of a part, dropout included."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lilt.build import build_model, build_pairs, build_splits
from lilt.config import TrainConfig
from lilt.data import Batch
from lilt.model import TwoTower
from lilt.train import step
from lilt.train.learner import Learner
from lilt.train.step import Objective, backward
from tests.train.conftest import Run


@pytest.fixture
def parts(settings: dict[str, Any], pictures: Any) -> tuple[TwoTower, Batch]:
    """A model with dropout in both towers and a batch of seven pairs."""
    vision = f"{settings['vision']}?proj_drop_rate=0.3"
    config = TrainConfig(
        **{**settings, "vision": vision}, policy="full", data=str(pictures / "manifest.jsonl"), augment="none"
    )
    model = build_model(config)
    dataset, collate = build_pairs(config, model, build_splits(config).train)
    return model, collate([dataset[0, i] for i in range(7)])


def gradients(model: TwoTower, batch: Batch, micro_batch: int | None) -> dict[str, Tensor]:
    accelerator = Accelerator()
    model.zero_grad()
    loss = backward(Learner(model), Objective(), [batch], accelerator, micro_batch).loss
    return {name: p.grad.clone() for name, p in model.trained().items() if p.grad is not None} | {"loss": loss}


@pytest.fixture(params=[8, 0], ids=["last piece held", "none held"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the last piece is passed once, as of few pieces, or twice like all, as of many."""
    monkeypatch.setattr(step, "HELD", request.param)
    return bool(request.param)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_the_gradient_is_that_of_the_whole_batch(parts: tuple[TwoTower, Batch], micro_batch: int, held: bool) -> None:
    model, batch = parts
    model.eval().double()
    batch = Batch(batch.images.double(), batch.tokens, batch.image_id, batch.text_id, batch.valid)
    whole, pieces = gradients(model, batch, None), gradients(model, batch, micro_batch)
    assert whole.keys() == pieces.keys()
    assert len(whole) == len(model.trained()) + 1
    for name, expected in whole.items():
        # embeddings are made fp32, which bounds what can be compared
        torch.testing.assert_close(pieces[name], expected, rtol=1e-4, atol=1e-7, msg=name)


class _Seen(nn.Module):
    """A learner that keeps what it gave."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner, self.given = learner, []  # type: ignore[var-annotated]

    def forward(
        self, images: Tensor, tokens: dict[str, Tensor], stored: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        out = self.learner(images, tokens, stored)
        self.given.append({name: value.detach() for name, value in out.items()})
        return out


def test_both_passes_drop_the_same(parts: tuple[TwoTower, Batch], held: bool) -> None:
    model, batch = parts
    seen = _Seen(Learner(model.train()))
    torch.manual_seed(3)
    backward(seen, Objective(), [batch], Accelerator(), 3)
    first, second = seen.given[:3], seen.given[3:]
    assert len(second) == (2 if held else 3)
    for one, other in zip(first, second, strict=False):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["text"], other["text"])
    # and it was dropout: the same rows once more are others
    assert not torch.equal(
        seen(batch.images[:3], {k: v[:3] for k, v in batch.tokens.items()})["image"], first[0]["image"]
    )


def test_with_dropout_a_held_piece_changes_nothing(
    parts: tuple[TwoTower, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = parts
    model.train()
    found = []
    for most in (8, 0):
        monkeypatch.setattr(step, "HELD", most)
        torch.manual_seed(3)
        found.append(gradients(model, batch, 2))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_random_stream_goes_on_as_after_one_pass(parts: tuple[TwoTower, Batch], held: bool) -> None:
    model, batch = parts
    model.train()
    torch.manual_seed(3)
    backward(Learner(model), Objective(), [batch], Accelerator(), 3)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with torch.no_grad():
        for piece in batch.split(3):
            model(piece.images, piece.tokens)
    assert torch.equal(after, torch.get_rng_state())


def test_the_number_of_exchanges_between_ranks_is_one(parts: tuple[TwoTower, Batch], held: bool) -> None:
    class Counting(Accelerator):  # type: ignore[misc]
        silent = 0

        def no_sync(self, model: nn.Module) -> Any:
            self.silent += 1
            return super().no_sync(model)

    model, batch = parts
    accelerator = Counting()
    backward(Learner(model), Objective(), [batch], accelerator, 2)
    assert accelerator.silent == (4 if held else 3)  # of four pieces; one that is held goes and comes back


def test_the_trainer_takes_it(run: Run) -> None:
    # locked towers are without dropout, so that both runs are one
    whole, pieces = (run(name, epochs=2, policy="frozen", micro_batch=size) for name, size in (("w", None), ("p", 4)))
    for name, expected in whole.model.trained().items():
        torch.testing.assert_close(pieces.model.trained()[name], expected, rtol=1e-3, atol=1e-4)
