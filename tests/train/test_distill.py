"""The distiller: one head for both modalities, a temperature that moves, a bank that is filled first."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lilt.losses.distill import contrastive_target
from lilt.train.distill import Distiller
from lilt.train.objectives import parse_objective

B, D, T, CLASSES = 6, 8, 5, 7
SPECS = ["contrastive(bank=12)", "contrastive(bank=0)", "contrastive(learn=true,bank=8)", "mse", "cosine",
         "kl(temperature=2)", "relational"]  # fmt: skip
every_objective = pytest.mark.parametrize("spec", SPECS)


@dataclass
class Step:
    """One gathered batch as a trainer sees it, in float64."""

    image: Tensor
    text: Tensor
    teacher: Tensor
    image_id: Tensor
    valid: Tensor


def step(seed: int, width: int = T) -> Step:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(B, D, dtype=torch.float64, generator=generator) for _ in range(2))
    teacher = torch.randn(B, width, dtype=torch.float64, generator=generator)
    valid = torch.rand(B, generator=generator) < 0.8
    return Step(image, text, teacher, torch.randint(9, (B,), generator=generator), valid)


def width_of(spec: str) -> int:
    return CLASSES if parse_objective(spec).needs == "logits" else T


def make(spec: str, **options: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(parse_objective(spec), D, width_of(spec), batch_size=B, **options).double()


def scale_of(distiller: Distiller) -> Tensor | None:
    """What a forward pass gives beside the rows."""
    return None if distiller.scale is None else distiller.scale()


def loss_of(distiller: Distiller, batch: Step, rank: int = 0, world: int = 1) -> Tensor:
    """The loss of one rank; all outputs come from one forward, as gathering with gradient gives them."""
    share = B // world
    rows = slice(rank * share, (rank + 1) * share)
    image, text = distiller(batch.image, batch.text)
    if not distiller.objective.gathers:
        image, text = image[rows], text[rows]
    known: dict[str, Any] = {"image_id": batch.image_id, "valid": batch.valid, "scale": scale_of(distiller)}
    return distiller.loss(image, text, batch.teacher, rows=rows, **known)[0]


def whole(distiller: Distiller, batch: Step) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one rank that has the whole batch, and its parts."""
    image, text = distiller(batch.image, batch.text)
    known: dict[str, Any] = {"rows": slice(0, B), "image_id": batch.image_id, "valid": batch.valid}
    return distiller.loss(image, text, batch.teacher, scale=scale_of(distiller), **known)


def train(distiller: Distiller, batches: list[Step], world: int = 1, state: dict | None = None) -> list[float]:
    """Train as a trainer does on that many ranks, each with a bank of its own; return the joint losses."""
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    ranks = [copy.deepcopy(distiller.bank) for _ in range(world)]
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    found = []
    for batch in batches:
        parts = []
        for rank, bank in enumerate(ranks):
            distiller.banks = () if bank is None else (bank,)
            parts.append(loss_of(distiller, batch, rank, world))
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distiller.clamp_()
        for bank in ranks:
            distiller.banks = () if bank is None else (bank,)
            distiller.remember(batch.teacher, batch.image_id, batch.valid)
        found.append(loss.item())
    if state is not None:
        state["optimizer"] = optimizer.state_dict()
    return found


def same(one: Any, other: Any) -> bool:
    """Say whether two state_dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_objective
def test_one_thin_head_serves_both_modalities(spec: str) -> None:
    distiller = make(spec)
    width, learned = width_of(spec), parse_objective(spec).learns_temperature
    assert sum(p.numel() for p in distiller.parameters()) == 2 * D + D * width + width + learned
    batch = step(1)
    image, text = distiller(batch.image, batch.image)
    assert torch.equal(image, text) and image.shape == (B, width)
    weight, bias = (distiller.get_parameter(f"head.1.{name}") for name in ("weight", "bias"))
    torch.testing.assert_close(image, F.layer_norm(batch.image, (D,), eps=1e-6) @ weight.T + bias)


def test_the_head_does_not_shrink_unit_rows() -> None:
    distiller = Distiller(parse_objective("mse"), 768, T, batch_size=B)
    rows = torch.randn(B, 768, generator=torch.Generator().manual_seed(0))
    plain, short = distiller(rows, F.normalize(rows, dim=-1))
    torch.testing.assert_close(plain, short, rtol=2e-3, atol=2e-3)


def test_what_the_head_gives_is_fp32_under_autocast() -> None:
    distiller = make("mse").float()
    batch = step(2)
    exact = distiller(batch.image.float(), batch.text.float())
    with torch.autocast("cpu", torch.bfloat16):
        rough = distiller(batch.image.float(), batch.text.float())
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@every_objective
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 1.5), (0.0, 1.0)])
def test_the_halves_are_weighted(spec: str, weights: tuple[float, float]) -> None:
    distiller = make(spec, image_weight=weights[0], text_weight=weights[1])
    batch = step(3, width_of(spec))
    loss, parts = whole(distiller, batch)
    halves = parts["distill_image"], parts["distill_text"]
    torch.testing.assert_close(loss, weights[0] * halves[0] + weights[1] * halves[1])
    assert halves[0] != halves[1] and not any(part.requires_grad for part in parts.values())
    swapped = whole(distiller, replace(batch, image=batch.text, text=batch.image))[1]
    torch.testing.assert_close((swapped["distill_text"], swapped["distill_image"]), halves)


@every_objective
def test_rows_that_are_not_real_do_not_count(spec: str) -> None:
    distiller, batch, other = make(spec), step(3, width_of(spec)), step(33, width_of(spec))
    batch.valid = torch.tensor([True, False, True, True, False, True])
    real = batch.valid.unsqueeze(1)
    names = ("image", "text", "teacher")
    changed = {name: torch.where(real, getattr(batch, name), getattr(other, name)) for name in names}
    torch.testing.assert_close(whole(distiller, replace(batch, **changed)), whole(distiller, batch))
    assert whole(distiller, replace(batch, teacher=other.teacher))[0] != whole(distiller, batch)[0]


@every_objective
def test_every_parameter_has_a_gradient_and_the_teacher_none(spec: str) -> None:
    distiller = make(spec)
    loss_of(distiller, step(4, width_of(spec))).backward()
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_objective
def test_the_loss_falls_when_the_head_is_trained(spec: str) -> None:
    batches = [step(seed, width_of(spec)) for seed in (5, 6)] * 30
    losses = train(make(spec), batches)
    # the last steps of each have the same candidates: a bank is full after at most four
    assert sum(losses[-2:]) < 0.8 * sum(losses[8:10])


@every_objective
@pytest.mark.parametrize("world", [2, 3])
def test_training_on_ranks_is_training_on_one(spec: str, world: int) -> None:
    batches = [step(seed, width_of(spec)) for seed in range(10, 18)]
    alone, together = make(spec), make(spec)
    one, many = train(alone, batches), train(together, batches, world)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(many), rtol=1e-9, atol=1e-12)
    for mine, other in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-10)


@every_objective
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_stop_and_resume_ends_in_the_same_bits(spec: str, cut: int) -> None:
    batches = [step(seed, width_of(spec)) for seed in range(20, 28)]
    unbroken, first = make(spec), make(spec)
    expected = train(unbroken, batches)
    saved: dict[str, Any] = {"optimizer": torch.optim.AdamW(first.parameters(), lr=1e-2).state_dict()}
    begun = train(first, batches[:cut], state=saved)
    file = io.BytesIO()
    bank = {} if first.bank is None else {"bank": first.bank.state_dict()}
    torch.save(saved | bank | {"head": first.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = make(spec)
    second.load_state_dict(state["head"])
    if second.bank is not None:
        second.bank.load_state_dict(state["bank"])
    assert begun + train(second, batches[cut:], state=state) == expected
    assert same(second.state_dict(), unbroken.state_dict())
    if unbroken.bank is not None and second.bank is not None:
        assert same(second.bank.state_dict(), unbroken.bank.state_dict())


@pytest.mark.parametrize(("turned", "end"), [(False, 100.0), (True, 1.0)])
def test_a_learned_temperature_moves_to_where_it_should_be_and_stays_in_its_range(turned: bool, end: float) -> None:
    distiller, batch = make("contrastive(learn=true,bank=0)"), step(30)
    assert distiller.scale is not None
    rows = -batch.teacher if turned else batch.teacher  # always wrong: the coldest is best; always right: the hottest
    known: dict[str, Any] = {"rows": slice(0, B), "image_id": torch.arange(B), "valid": torch.ones(B).bool()}
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.3)
    seen = [distiller.scale().item()]
    for _ in range(40):
        optimizer.zero_grad()
        distiller.loss(rows, rows, batch.teacher, scale=distiller.scale(), **known)[0].backward()
        optimizer.step()
        distiller.clamp_()
        seen.append(distiller.scale().item())
    assert seen[0] == pytest.approx(1 / 0.07)
    assert abs(seen[1] - seen[0]) > 1
    assert seen == sorted(seen, reverse=turned) and seen[-1] == pytest.approx(end)


def test_a_fixed_temperature_is_what_was_asked_for() -> None:
    batch, distiller = step(31), make("contrastive(temperature=0.2,bank=0)")
    assert distiller.scale is None
    image, text = distiller(batch.image, batch.text)
    known: dict[str, Any] = {"rows": slice(0, B), "image_id": batch.image_id, "valid": batch.valid}
    halves = [
        contrastive_target(F.normalize(x, dim=-1), F.normalize(batch.teacher, dim=-1), 1 / 0.2, **known)
        for x in (image, text)
    ]
    loss, parts = distiller.loss(image, text, batch.teacher, scale=None, **known)
    torch.testing.assert_close(loss, (halves[0] + halves[1]) / 2)
    assert "distill_temperature" not in parts


def test_a_learned_temperature_is_logged() -> None:
    batch, distiller = step(32), make("contrastive(temperature=0.2,learn=true,bank=0)")
    assert whole(distiller, batch)[1]["distill_temperature"].item() == pytest.approx(0.2)


def test_the_bank_joins_when_it_is_full_and_holds_unit_rows() -> None:
    plain, banked = make("contrastive(bank=0)"), make("contrastive(bank=12)")
    assert banked.bank is not None
    for seed in range(40, 46):
        batch = step(seed)
        without, with_bank = loss_of(plain, batch).item(), loss_of(banked, batch).item()
        assert (with_bank > without) if banked.bank.full else (with_bank == without)
        banked.remember(batch.teacher, batch.image_id, batch.valid)
    assert banked.bank.full
    torch.testing.assert_close(banked.bank.rows.norm(dim=1), torch.ones(12, dtype=torch.float64))
    assert banked.bank.image_id[banked.bank.pointer - 1] == batch.image_id[batch.valid][-1]


def test_images_of_the_batch_are_no_strangers_to_themselves_in_the_bank() -> None:
    plain, banked = make("contrastive(bank=0)"), make("contrastive(bank=6)")
    batch = step(50)
    one = torch.zeros(B, dtype=torch.long)
    batch.image_id, batch.valid = one, torch.ones(B, dtype=torch.bool)
    banked.remember(batch.teacher, one, batch.valid)
    assert banked.bank is not None and banked.bank.full
    # a batch and a bank of one image: nothing is left to tell it from
    assert loss_of(plain, batch).item() == loss_of(banked, batch).item() == 0
    banked.bank.image_id += 1
    assert loss_of(banked, batch).item() > 0


def test_head_and_bank_go_to_the_device_together_and_the_bank_is_saved_beside() -> None:
    distiller = make("contrastive(bank=12)")
    assert set(distiller.state_dict()) == {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert not list(distiller.buffers())
    assert distiller.bank is not None and set(distiller.bank.state_dict()) == {"rows", "image_id", "pushed"}
    there = torch.nn.Sequential(distiller).to("meta")
    assert {t.device.type for t in (*there.parameters(), *distiller.bank.buffers())} == {"meta"}


def test_a_bank_that_does_not_fit_the_run_is_an_error_before_it_starts() -> None:
    with pytest.raises(ValueError, match=r"a bank of 5 rows is smaller than the batch of 6; expected .*; give bank=6"):
        make("contrastive(bank=5)")
    with pytest.raises(ValueError, match=r"a bank of 65536 rows is used once it is full, and the run shows 60 pairs"):
        make("contrastive", pairs=60)
    assert make("mse", pairs=60).bank is None


def test_another_number_of_classes_than_the_teacher_s_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gives rows of 7 and the teacher of 9 \(classes\); expected the same; build"):
        loss_of(make("kl"), step(60, 9))


def test_another_width_than_the_teacher_s_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gives rows of 5 and the teacher of 9 \(width\); expected the same; build"):
        loss_of(make("cosine"), step(61, 9))


def test_features_of_another_width_are_an_error() -> None:
    batch = step(62)
    with pytest.raises(ValueError, match=r"the text features have width 3, the distillation head 8; .*; build"):
        make("mse")(batch.image, batch.text[:, :3])


@pytest.mark.parametrize(
    ("spec", "word"), [("contrastive(learn=true,bank=0)", "without"), ("contrastive(bank=0)", "with")]
)
def test_a_scale_that_is_forgotten_or_not_wanted_is_an_error(spec: str, word: str) -> None:
    distiller, batch = make(spec), step(63)
    image, text = distiller(batch.image, batch.text)
    known: dict[str, Any] = {"rows": slice(0, B), "image_id": batch.image_id, "valid": batch.valid}
    scale = None if word == "without" else torch.tensor(5.0)
    with pytest.raises(ValueError, match=rf"Contrastive came {word} a scale; expected one where .*; pass the"):
        distiller.loss(image, text, batch.teacher, scale=scale, **known)


@pytest.mark.parametrize("weights", [(-0.1, 1.0), (0.0, 0.0)])
def test_weights_without_a_sense_are_an_error(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"distillation weights of .*; expected none below 0 and one above; give 0.5"):
        make("mse", image_weight=weights[0], text_weight=weights[1])
