"""Distillation losses against loops written from the formulas, finite differences and torch's own criteria."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lilt.losses.distill import Memory, contrastive_target, cosine, kl, mse, relational

G, W, K = 6, 5, 4
EVERY = slice(0, G)
IMAGES = torch.tensor([7, 8, 7, 9, 10, 8])  # 0 and 2 show one image, so do 1 and 5
OLDER = torch.tensor([8, 11, 7, 12])
PARTS = pytest.mark.parametrize("rows", [EVERY, slice(0, 3), slice(3, 6), slice(2, 4)])
Loss = Callable[..., Tensor]


def normal(seed: int, rows: int = G) -> Tensor:
    return torch.randn(rows, W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(seed: int, rows: int = G) -> Tensor:
    return F.normalize(normal(seed, rows), dim=-1)


def scale() -> Tensor:
    return torch.tensor(7.3, dtype=torch.float64, requires_grad=True)


def memory(filled: int = K, seed: int = 30) -> Memory:
    return Memory(unit(seed, K), OLDER, torch.tensor(filled))


def without(bad: tuple[int, ...]) -> Tensor:
    return torch.tensor([i not in bad for i in range(G)])


def ours(name: str, student: Tensor, rows: slice) -> Tensor:
    """The rows a loss is given: all of them for the one that compares all."""
    return student if name == "relational" else student[rows]


LOSSES: dict[str, Loss] = {
    "contrastive": lambda z, t, s, **k: contrastive_target(z, t, s, image_id=IMAGES, memory=memory(), **k),
    "contrastive, batch": lambda z, t, s, **k: contrastive_target(z, t, s, image_id=IMAGES, **k),
    "mse": lambda z, t, s, **k: mse(z, t, **k),
    "cosine": lambda z, t, s, **k: cosine(z, t, **k),
    "kl": lambda z, t, s, **k: kl(z, t, temperature=2.5, **k),
    "relational": lambda z, t, s, **k: relational(z, t, temperature=0.3, **k),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def softmax(scores: dict[int, float]) -> dict[int, float]:
    below = math.fsum(math.exp(s) for s in scores.values())
    return {j: math.exp(s) / below for j, s in scores.items()}


def slow_contrastive(z: Tensor, t: Tensor, s: float, i: int, valid: Tensor, kept: Memory | None) -> float:
    """-log of the share of the own teacher row among the candidates that do not show its image."""
    candidates = [t[i]] + [t[j] for j in range(G) if j != i and valid[j] and IMAGES[j] != IMAGES[i]]
    if kept is not None:
        candidates += [kept.rows[j] for j in range(int(kept.filled)) if kept.image_id[j] != IMAGES[i]]
    return -math.log(softmax({j: s * dot(z[i], c) for j, c in enumerate(candidates)})[0])


def slow_mse(z: Tensor, t: Tensor, i: int) -> float:
    return 0.5 * math.fsum((float(a) - float(b)) ** 2 for a, b in zip(z[i], t[i], strict=True)) / W


def slow_cosine(z: Tensor, t: Tensor, i: int) -> float:
    return 1 - dot(z[i], t[i]) / math.sqrt(dot(z[i], z[i]) * dot(t[i], t[i]))


def slow_kl(z: Tensor, t: Tensor, temperature: float, i: int) -> float:
    p, q = (softmax({j: float(x[i, j]) / temperature for j in range(W)}) for x in (t, z))
    return temperature**2 * math.fsum(p[j] * math.log(p[j] / q[j]) for j in range(W))


def slow_relational(z: Tensor, t: Tensor, temperature: float, i: int, valid: Tensor) -> float:
    others = [j for j in range(G) if j != i and valid[j]]
    p, q = (softmax({j: dot(x[i], x[j]) / temperature for j in others}) for x in (t, z))
    return math.fsum(p[j] * math.log(p[j] / q[j]) for j in others)


def slow(name: str, z: Tensor, t: Tensor, rows: slice, valid: Tensor) -> float:
    """The sum over our valid rows, over our share of all valid rows."""
    each: dict[str, Callable[[int], float]] = {
        "contrastive": lambda i: slow_contrastive(z, t, 7.3, i, valid, memory()),
        "contrastive, batch": lambda i: slow_contrastive(z, t, 7.3, i, valid, None),
        "mse": lambda i: slow_mse(z, t, i),
        "cosine": lambda i: slow_cosine(z, t, i),
        "kl": lambda i: slow_kl(z, t, 2.5, i),
        "relational": lambda i: slow_relational(z, t, 0.3, i, valid),
    }
    total = math.fsum(each[name](i) for i in range(rows.start, rows.stop) if valid[i])
    return total / (int(valid.sum()) * (rows.stop - rows.start) / G)


def inputs(name: str, seed: int) -> tuple[Tensor, Tensor]:
    make = normal if name in ("mse", "cosine", "kl") else unit
    return make(seed), make(seed + 50)


@every_loss
@PARTS
@pytest.mark.parametrize("bad", [(), (2, 5), (0, 1, 2, 4, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_the_formula(name: str, rows: slice, bad: tuple[int, ...], seed: int) -> None:
    student, teacher = inputs(name, seed)
    valid = without(bad)
    found = LOSSES[name](ours(name, student, rows), teacher, scale(), rows=rows, valid=valid)
    assert found.item() == pytest.approx(slow(name, student, teacher, rows, valid), rel=1e-12)
    if not bad:
        assert found == LOSSES[name](ours(name, student, rows), teacher, scale(), rows=rows)


@every_loss
@PARTS
def test_the_gradient_is_that_of_finite_differences(name: str, rows: slice) -> None:
    student, teacher = inputs(name, 3)
    valid = without((4,))

    def loss(z: Tensor, s: Tensor) -> Tensor:
        return LOSSES[name](z, teacher, s, rows=rows, valid=valid)

    assert torch.autograd.gradcheck(loss, (ours(name, student, rows).clone().requires_grad_(True), scale()))


@pytest.mark.parametrize("rows", [EVERY, slice(3, 6)])
def test_torch_agrees_in_value_and_gradient(rows: slice) -> None:
    plain, theirs, z, t = normal(5), normal(55), unit(6), unit(56)
    different = torch.arange(G)
    ours_: dict[str, tuple[Tensor, Loss, Loss]] = {
        "cross_entropy": (
            z[rows],
            lambda x: contrastive_target(x, t, 7.3, rows=rows, image_id=different),
            lambda x: F.cross_entropy(7.3 * x @ t.T, different[rows]),
        ),
        "mse_loss": (
            plain[rows],
            lambda x: mse(x, theirs, rows=rows),
            lambda x: F.mse_loss(x, theirs[rows]) / 2,
        ),
        "cosine_embedding_loss": (
            plain[rows],
            lambda x: cosine(x, theirs, rows=rows),
            lambda x: F.cosine_embedding_loss(x, theirs[rows], torch.ones(len(x))),
        ),
        "kl_div": (
            plain[rows],
            lambda x: kl(x, theirs, rows=rows),
            lambda x: F.kl_div(x.log_softmax(1), theirs[rows].softmax(1), reduction="batchmean"),
        ),
        "Categorical": (
            z,
            lambda x: relational(x, t, rows=rows, temperature=0.3),
            lambda x: kl_divergence(*(Categorical(logits=others(y) / 0.3) for y in (t, x)))[rows].mean(),
        ),
    }
    for name, (start, mine, reference) in ours_.items():
        x = start.clone().requires_grad_(True)
        values = mine(x), reference(x)
        torch.testing.assert_close(*values, rtol=1e-12, atol=0, msg=name)
        gradients = [torch.autograd.grad(value, x)[0] for value in values]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14, msg=name)


def others(x: Tensor) -> Tensor:
    """The similarities (G, G - 1) of each row to the others."""
    return (x @ x.T)[~torch.eye(G, dtype=torch.bool)].view(G, G - 1)


@every_loss
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("bad", [(), (2, 5), (0, 1, 2), (0, 1, 2, 3, 5)])
def test_the_mean_over_ranks_is_the_loss_of_the_joint_batch(name: str, world: int, bad: tuple[int, ...]) -> None:
    student, teacher = inputs(name, 7)
    student, factor, valid = student.requires_grad_(True), scale(), without(bad)
    joint = LOSSES[name](student, teacher, factor, rows=EVERY, valid=valid)
    parts = [slice(rank * G // world, (rank + 1) * G // world) for rank in range(world)]
    shares = [LOSSES[name](ours(name, student, rows), teacher, factor, rows=rows, valid=valid) for rows in parts]
    mean = torch.stack(shares).mean()
    torch.testing.assert_close(mean, joint, rtol=1e-12, atol=1e-14)
    leaves = (student, factor) if name.startswith("contrastive") else (student,)
    for mine, other in zip(*(torch.autograd.grad(x, leaves) for x in (mean, joint)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


@every_loss
def test_an_invalid_row_is_as_if_it_were_not_there(name: str) -> None:
    student, teacher = inputs(name, 9)
    student.requires_grad_(True)
    kept = [i for i in range(G) if i != 4]
    full = LOSSES[name](student, teacher, 7.3, rows=EVERY, valid=without((4,)))
    fewer: dict[str, Any] = {"rows": slice(0, G - 1)}
    if name.startswith("contrastive"):
        stored = None if "batch" in name else memory()
        less = contrastive_target(student[kept], teacher[kept], 7.3, image_id=IMAGES[kept], memory=stored, **fewer)
    else:
        less = LOSSES[name](student[kept], teacher[kept], 7.3, **fewer)
    torch.testing.assert_close(full, less, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (full, less)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@every_loss
@pytest.mark.parametrize("real", [(), (3,)])
def test_a_batch_with_no_real_row_or_one_is_not_a_number_of_trouble(name: str, real: tuple[int, ...]) -> None:
    student, teacher = inputs(name, 11)
    student.requires_grad_(True)
    valid = torch.tensor([i in real for i in range(G)])
    with torch.autograd.set_detect_anomaly(True):  # a NaN on the way back is an error, even one that is masked later
        loss = LOSSES[name](student, teacher, 7.3, rows=EVERY, valid=valid)
        gradient = torch.autograd.grad(loss, student)[0]
    assert gradient[~valid].eq(0).all()
    # what compares with others of the batch has nothing to say of one row
    if not real or name in ("contrastive, batch", "relational"):
        assert loss.item() == 0 and gradient.eq(0).all()
    else:
        assert loss.item() > 0 and gradient[valid].abs().max() > 0


@every_loss
def test_a_student_that_gives_what_the_teacher_gives_cannot_do_better(name: str) -> None:
    _, teacher = inputs(name, 13)
    student = teacher.clone().requires_grad_(True)
    loss = LOSSES[name](student, teacher, 7.3, rows=EVERY)
    if name.startswith("contrastive"):  # the own is the nearest, and the share of the others is what is left
        turned = LOSSES[name](teacher.flip(0), teacher, 7.3, rows=EVERY)
        assert loss < turned
        assert LOSSES[name](teacher, teacher, 700.0, rows=EVERY) < 1e-6
    else:
        assert loss.item() == pytest.approx(0, abs=1e-14)
        assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-14


def test_another_copy_of_the_own_image_is_no_candidate() -> None:
    student, teacher, stored = unit(15), unit(16), memory()

    def first_row(t: Tensor, kept: Memory) -> float:
        return contrastive_target(student[:1], t, 7.3, rows=slice(0, 1), image_id=IMAGES, memory=kept).item()

    def changed(rows: Tensor, at: int) -> Tensor:
        return torch.cat([rows[:at], unit(99, 1), rows[at + 1 :]])

    base = first_row(teacher, stored)
    moves = [at for at in range(G) if first_row(changed(teacher, at), stored) != base]
    assert moves == [0, 1, 3, 4, 5]  # the own row counts, 2 is its image in another pair
    moves = [
        at for at in range(K) if first_row(teacher, Memory(changed(stored.rows, at), OLDER, torch.tensor(K))) != base
    ]
    assert moves == [0, 1, 3]  # 2 is its image of an earlier step


@pytest.mark.parametrize("filled", range(K + 1))
def test_only_the_filled_part_of_a_memory_counts(filled: int) -> None:
    student, teacher = unit(17), unit(18)
    known: dict[str, Any] = {"rows": EVERY, "image_id": IMAGES}
    found = contrastive_target(student, teacher, 7.3, memory=memory(filled), **known)
    rest = Memory(unit(30, K)[:filled], OLDER[:filled], torch.tensor(filled))
    torch.testing.assert_close(found, contrastive_target(student, teacher, 7.3, memory=rest, **known))
    if filled == 0:
        torch.testing.assert_close(found, contrastive_target(student, teacher, 7.3, **known))
    else:
        assert found > contrastive_target(student, teacher, 7.3, memory=memory(filled - 1), **known)


def test_the_temperature_keeps_the_size_of_the_gradient_of_kl() -> None:
    student, teacher = normal(19).requires_grad_(True), normal(20)
    sizes = [torch.autograd.grad(kl(student, teacher, rows=EVERY, temperature=t), student)[0].norm() for t in (1, 50)]
    assert 0.3 < (sizes[1] / sizes[0]).item() < 3  # without the factor it is smaller by 2500


WIDTHS: dict[str, Callable[[], Tensor]] = {
    "contrastive": lambda: contrastive_target(unit(1)[:, :3], unit(2), 7.3, rows=EVERY, image_id=IMAGES),
    "mse": lambda: mse(normal(1)[:, :3], normal(2), rows=EVERY),
    "cosine": lambda: cosine(normal(1)[:, :3], normal(2), rows=EVERY),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_another_width_than_the_teacher_s_is_an_error(name: str) -> None:
    wanted = r"gives rows of 3 and the teacher of 5 \(width\); expected the same; build the head with the width"
    with pytest.raises(ValueError, match=wanted):
        WIDTHS[name]()


def test_another_number_of_classes_is_an_error() -> None:
    wanted = r"rows of 3 and the teacher of 5 \(classes\); expected the same; build the head with the classes"
    with pytest.raises(ValueError, match=wanted):
        kl(normal(1)[:, :3], normal(2), rows=EVERY)


def test_a_memory_of_another_width_is_an_error() -> None:
    narrow = Memory(unit(30, K)[:, :2], OLDER, torch.tensor(K))
    with pytest.raises(ValueError, match=r"rows of 5 and the memory of 2 \(width\); expected the same; build"):
        contrastive_target(unit(1), unit(2), 7.3, rows=EVERY, image_id=IMAGES, memory=narrow)


@pytest.mark.parametrize(("count", "rows"), [(6, slice(0, 3)), (3, slice(4, 7))])
def test_rows_that_are_not_ours_are_an_error(count: int, rows: slice) -> None:
    wanted = rf"{count} student rows do not fit rows {rows.start} to {rows.stop} of 6; expected our part .*; give the"
    with pytest.raises(ValueError, match=wanted):
        mse(normal(1, count), normal(2), rows=rows)


def test_relations_need_all_rows_of_both() -> None:
    with pytest.raises(ValueError, match=r"got 3 student rows and 6 of the teacher; expected all rows .*: gather"):
        relational(unit(1, 3), unit(2), rows=slice(0, 3))
