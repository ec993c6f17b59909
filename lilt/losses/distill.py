"""Distillation losses: how far a student's rows are from what a teacher says of the same images.

Legend: B our rows, G the rows of all ranks in rank order, W the teacher's width or its number of classes. student
(B, W) has passed the thin head; teacher (G, W) is gathered and has no gradient; rows selects the B that are ours;
valid (G,) excludes padding rows. Each function returns a mean over valid rows, and its mean over ranks is the value of
the joint batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Memory:
    """Candidates from earlier batches: rows (K, W), whose images they are (K,), and how many of them count, ()."""

    def __init__(self, rows: Tensor, image_id: Tensor, filled: Tensor):
        self.rows, self.image_id, self.filled = rows, image_id, filled


def contrastive_target(
    student: Tensor,
    teacher: Tensor,
    scale: Tensor | float,
    *,
    rows: slice,
    image_id: Tensor,
    valid: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Cross-entropy of each row against its own teacher row, among the teacher rows of the batch and of a memory.

    -log exp(s z·t) / sum over candidates of exp(s z·c), with s = 1 / temperature. student and teacher have unit rows.
    Candidates are the valid rows of the batch and the first `filled` of the memory; those that show the same image as
    the row, told by image_id (G,), are left out, except its own.
    Source: Cares, S-SMKE (LiteITR), the contrastive distillation loss with a memory bank.
    """
    _check(student, teacher, rows)
    own = torch.arange(len(teacher), device=teacher.device)
    out = image_id[rows].unsqueeze(1) == image_id
    if valid is not None:
        out = out | ~valid
    out = out & (own[rows].unsqueeze(1) != own)
    student = scale * student
    logits = student @ teacher.T
    if memory is not None:
        _check(student, memory.rows, rows, whose="the memory")
        place = torch.arange(len(memory.rows), device=memory.rows.device)
        older = (image_id[rows].unsqueeze(1) == memory.image_id) | (place >= memory.filled)
        # the products are joined and not the rows: these would be copied at each step
        logits, out = torch.cat([logits, student @ memory.rows.T], dim=1), torch.cat([out, older], dim=1)
    losses = F.cross_entropy(logits.masked_fill(out, float("-inf")), own[rows], reduction="none")
    return _joint_mean(losses, rows, len(teacher), valid)


def mse(student: Tensor, teacher: Tensor, *, rows: slice, valid: Tensor | None = None) -> Tensor:
    """Half of the squared distance to the own teacher row, averaged over the width: ½ ‖z - t‖² / W.

    Averaged, because a sum grows with the teacher's width and at 768 drowns the contrastive term it stands beside 1:1;
    the code behind the published numbers averages too (and has no ½: its weight 1 is 2 here).
    """
    _check(student, teacher, rows)
    return _joint_mean((student - teacher[rows]).square().mean(1) / 2, rows, len(teacher), valid)


def cosine(student: Tensor, teacher: Tensor, *, rows: slice, valid: Tensor | None = None) -> Tensor:
    """One minus the cosine with the own teacher row; rows of any length."""
    _check(student, teacher, rows)
    return _joint_mean(1 - F.cosine_similarity(student, teacher[rows], dim=1), rows, len(teacher), valid)


def kl(
    student: Tensor, teacher: Tensor, *, rows: slice, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """KL divergence of the student's class distribution from the teacher's, both given as logits.

    temperature² KL(softmax(teacher / temperature) ‖ softmax(student / temperature)); the factor keeps the size of the
    gradient when the temperature changes.
    Source: Aytar et al. 2017, arXiv 1706.00932, with temperature 1; the factor: Hinton et al. 2015, arXiv 1503.02531.
    """
    _check(student, teacher, rows, unit="classes")
    wanted, given = (F.log_softmax(x / temperature, dim=1) for x in (teacher[rows], student))
    losses = F.kl_div(given, wanted, reduction="none", log_target=True).sum(1)
    return _joint_mean(losses * temperature**2, rows, len(teacher), valid)


def relational(
    student: Tensor, teacher: Tensor, *, rows: slice, temperature: float = 0.1, valid: Tensor | None = None
) -> Tensor:
    """KL divergence between how alike the teacher and the student find each row and the others of the batch.

    Here student is gathered as well, (G, any width): p_t(j|i) = softmax over j ≠ i of t_i·t_j / temperature, p_s from
    the student's rows in the same way, and KL(p_t(·|i) ‖ p_s(·|i)) for our rows i. All rows have unit length. A row
    that is the only valid one has no relation and counts as 0.
    Source: Passalis & Tefas 2018, arXiv 1803.10837, with the softmax and the temperature of Fang et al. 2021 (SEED),
    arXiv 2101.04731, and its queue replaced by the batch; relations as a target: Park et al. 2019, arXiv 1904.05068.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"relational got {len(student)} student rows and {len(teacher)} of the teacher; expected all rows of the "
            "batch on both sides: gather the student's too"
        )
    own = torch.arange(len(teacher), device=teacher.device)
    out = own[rows].unsqueeze(1) == own
    if valid is not None:
        out = out | ~valid
    related = ~out.all(1)
    # a row without relations keeps all columns: a softmax over none is NaN, in the gradient too
    out = out & related.unsqueeze(1)
    wanted, given = (
        F.log_softmax((x[rows] @ x.T / temperature).masked_fill(out, float("-inf")), dim=1) for x in (teacher, student)
    )
    # 0 · (-inf + inf) is NaN, so what is left out leaves the difference before the product
    losses = (wanted.exp() * (wanted - given).masked_fill(out, 0.0)).sum(1)
    return _joint_mean(torch.where(related, losses, 0.0), rows, len(teacher), valid)


def _joint_mean(losses: Tensor, rows: slice, total: int, valid: Tensor | None) -> Tensor:
    """Return our share (B,) of the mean over the valid rows of the joint batch, such that the mean over ranks is it."""
    if valid is None:
        return losses.mean()
    count = valid.sum().clamp(min=1).to(losses.dtype) * (len(losses) / total)
    return torch.where(valid[rows], losses, 0.0).sum() / count


def _check(student: Tensor, theirs: Tensor, rows: slice, unit: str = "width", whose: str = "the teacher") -> None:
    if student.shape[1] != theirs.shape[1]:
        raise ValueError(
            f"the student gives rows of {student.shape[1]} and {whose} of {theirs.shape[1]} ({unit}); expected the "
            f"same; build the head with the {unit} of the teacher that is used, and its cache and memory anew"
        )
    if rows.stop - rows.start != len(student) or (whose == "the teacher" and rows.stop > len(theirs)):
        raise ValueError(
            f"{len(student)} student rows do not fit rows {rows.start} to {rows.stop} of {len(theirs)}; expected our "
            "part of the gathered batch; give the slice of rows that are ours"
        )
