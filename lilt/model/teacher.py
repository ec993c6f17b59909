"""A teacher: a frozen image model that says what an image is, in features or in classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.towers import ImageContract, build_classifier, build_tower


class Teacher:
    """Shows a frozen image model what a student sees: (B, 3, H, W) in the student's normalisation -> (B, dim).

    No module on purpose: its weights are no part of what is trained, counted or saved.
    """

    def __init__(self, network: nn.Module, contract: ImageContract, dim: int, student: ImageContract):
        self.network = network.eval().requires_grad_(False)
        self.image_px = contract.image_px
        self.dim = dim
        self.same = (contract.mean, contract.std) == (student.mean, student.std)
        # (x * std_s + mean_s - mean_t) / std_t in one product and one sum
        spread = [s / t for s, t in zip(student.std, contract.std, strict=True)]
        shift = [(s - t) / d for s, t, d in zip(student.mean, contract.mean, contract.std, strict=True)]
        self.spread, self.shift = torch.tensor(spread).view(3, 1, 1), torch.tensor(shift).view(3, 1, 1)

    def to(self, device: torch.device) -> Teacher:
        """Move the network and the normalisation."""
        self.network.to(device)
        self.spread, self.shift = self.spread.to(device), self.shift.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if not self.same:
            images = images * self.spread + self.shift
        if images.shape[-1] != self.image_px:
            side = (self.image_px, self.image_px)
            images = F.interpolate(images, side, mode="bicubic", align_corners=False, antialias=True)
        return self.network(images).float()


def build_teacher(spec: str, gives: str, student: ImageContract) -> Teacher:
    """Build the teacher of a tower spec; gives: "features" (what its pool says) or "logits" (of its classifier).

    Without ?image_px= it works at the student's resolution. Raises ValueError where it has no classifier and one is
    needed, or where the student's preprocess is a plain callable, whose normalisation nobody can undo.
    """
    if student.transform is not None:
        raise ValueError(
            f"teacher={spec!r}: the student's preprocess is a plain callable, and the teacher needs to undo its "
            "normalisation; give the vision tower lilt.ImageContract(image_px=…, mean=…, std=…) instead"
        )
    network = (
        build_classifier(spec, student.image_px)
        if gives == "logits"
        else build_tower(spec, "vision", image_px=student.image_px)
    )
    contract = network.contract
    if not isinstance(contract, ImageContract) or contract.transform is not None:
        raise ValueError(
            f"teacher={spec!r} brings a plain callable as its preprocess; a teacher sees the student's images, so it "
            "needs lilt.ImageContract(image_px=…, mean=…, std=…); return one from the factory"
        )
    return Teacher(network, contract, network.dim, student)
