"""The part of a student that meets a teacher: a thin head, a temperature and a bank, dropped after training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.config import TrainConfig
from lilt.model import Teacher, TwoTower
from lilt.towers.loading import fixed_seed
from lilt.train.bank import Bank
from lilt.train.objectives import Distillation, Target, parse_objective


class Distiller(nn.Module):
    """Takes both modalities to the teacher's space with one thin head, and says how far they are from the teacher.

    It exists in training only. Its parameters are trained with the model's; its bank is no child of it, so that no
    wrapper of processes sends the bank around and no state_dict holds it: save `distiller.bank` beside.
    """

    def __init__(
        self,
        objective: Distillation,
        dim: int,
        teacher_dim: int,
        *,
        batch_size: int,
        pairs: int | None = None,
        image_weight: float = 0.5,
        text_weight: float = 0.5,
    ):
        """dim, teacher_dim: widths of the student's joint space, and of the teacher's features or its class count;
        batch_size: rows of a gathered batch; pairs: those that the whole run shows, None if the bank is filled before.
        """
        super().__init__()
        if min(image_weight, text_weight) < 0 or image_weight + text_weight == 0:
            raise ValueError(
                f"distillation weights of {image_weight} (image) and {text_weight} (text); expected none below 0 and "
                "one above; give 0.5 and 0.5"
            )
        self.objective = objective
        self.image_weight, self.text_weight = image_weight, text_weight
        # unit rows of width 768 have a variance of 0.0013: the usual 1e-5 would shrink them
        self.head = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, teacher_dim))
        self.scale = objective.make_scale()
        bank = objective.make_bank(teacher_dim, batch_size, pairs)
        self.banks = () if bank is None else (bank,)  # in a tuple a module is a reference, not a child

    @property
    def bank(self) -> Bank | None:
        """Return the memory bank, None where the objective has none."""
        return self.banks[0] if self.banks else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        for bank in self.banks:  # it goes to the device with the head
            bank._apply(fn)
        return self

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Map both modalities (B, D) to (B, T), in fp32 also under autocast."""
        dim = self.head[1].in_features  # of the linear map
        for side, features in (("image", image_features), ("text", text_features)):
            if features.shape[-1] != dim:
                raise ValueError(
                    f"the {side} features have width {features.shape[-1]}, the distillation head {dim}; expected the "
                    "width of the joint space; build the head with the projection's"
                )
        return self._wide(self.head(image_features)), self._wide(self.head(text_features))

    def loss(
        self,
        image_out: Tensor,
        text_out: Tensor,
        teacher: Tensor,
        *,
        rows: slice,
        image_id: Tensor,
        valid: Tensor,
        scale: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of our rows and its parts.

        image_out and text_out are what forward gave: ours (B, T), or of all ranks (G, T), gathered with gradient, where
        objective.gathers. teacher (G, T), image_id (G,) and valid (G,), boolean, are gathered. scale is self.scale() of
        the same forward pass where the temperature is learned, else None.
        """
        # handed in, for a step of micro-batches sends gradients only through what the forward pass gave
        if (scale is None) != (self.scale is None):
            raise ValueError(
                f"{type(self.objective).__name__} came {'without' if scale is None else 'with'} a scale; expected one "
                "where learn=true and none elsewhere; pass the distiller's from the forward pass"
            )
        memory = None if self.bank is None else self.bank.read()
        target = Target(self._comparable(teacher.to(image_out.dtype)), rows, image_id, valid, scale, memory)
        image, text = (self.objective(self._comparable(out), target) for out in (image_out, text_out))
        parts = {"distill_image": image.detach(), "distill_text": text.detach()}
        if scale is not None:
            parts["distill_temperature"] = 1 / scale.detach()
        return self.image_weight * image + self.text_weight * text, parts

    def remember(self, teacher: Tensor, image_id: Tensor, valid: Tensor) -> None:
        """Put the gathered batch into the bank, if there is one; to be called after the backward pass of each step."""
        if self.bank is not None:
            self.bank.push(self._comparable(teacher.to(self.bank.rows.dtype)), image_id, valid)

    def clamp_(self) -> None:
        """Bring a learned temperature back into its range; to be called after each optimizer step."""
        if self.scale is not None:
            self.scale.clamp_()

    def _comparable(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.objective.normalises else rows

    @staticmethod
    def _wide(rows: Tensor) -> Tensor:
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def build_distiller(
    config: TrainConfig, core: TwoTower, teacher: Teacher | None, rows: int, steps: int
) -> Distiller | None:
    """Return what a model meets its teacher with, started from the seed, for batches of so many rows; None: no teacher.

    Raises ValueError for a bank that such a run never fills.
    """
    if teacher is None:
        return None
    with fixed_seed(config.seed):
        return Distiller(
            parse_objective(config.distill),
            core.projection.dim,
            teacher.dim,
            batch_size=rows,
            pairs=steps * rows,
            image_weight=config.distill_image,
            text_weight=config.distill_text,
        )
