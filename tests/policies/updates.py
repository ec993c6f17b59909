"""What LoRA has added to a tower, and the same written into a plain one by the formula of the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf

from lilt.policies.edits import Attach, Edit, Reparametrize
from lilt.policies.low_rank import LowRank, Magnitudes
from lilt.towers import Tower
from tests.policies.conformance import tuned

KINDS = pytest.mark.parametrize("dora", ["false", "true"])


def edits_of(tower: Tower) -> list[Attach | Reparametrize]:
    edits: list[Edit] = list(dict.fromkeys((tower.fates or {}).values()))
    assert edits and all(isinstance(edit, (Attach, Reparametrize)) for edit in edits)
    return edits  # type: ignore[return-value]


def children(tower: Tower) -> dict[tuple[str, str], LowRank]:
    """Return what LoRA added, by the path of its module and its name."""
    found = {(edit.path, edit.name): edit.child(tower.body) for edit in edits_of(tower)}
    assert all(isinstance(child, LowRank) for child in found.values())
    return found  # type: ignore[return-value]


def alive(spec: str, tower: Tower) -> Tower:
    """Apply a policy and draw all that starts as nothing: B, and how far the magnitudes are from the norms."""
    tuned(spec, tower)
    generator = torch.Generator().manual_seed(5)
    for child in children(tower).values():
        if isinstance(child, Magnitudes):
            child.m.data.mul_(1 + 0.5 * torch.randn(child.m.shape, generator=generator))
    return tower


def update(dense: Tower, edit: Attach | Reparametrize, child: LowRank, scale: float) -> None:
    """Write an update into the weight it belongs to, by the formula of the paper."""
    module = dense.body.get_submodule(edit.path)
    weight = getattr(module, edit.adds_to if isinstance(edit, Attach) else edit.tensor)
    matrix = weight.T if isinstance(module, hf.pytorch_utils.Conv1D) else weight.flatten(1)
    held = "kv" if edit.path.endswith(".kv") else "qkv"
    start = len(matrix) // len(held) * max(held.find(edit.name[-1]), 0) if edit.name != "lora" else 0
    rows = matrix[start : start + len(child.b)]
    rows += scale * child.b @ child.a
    if isinstance(child, Magnitudes):
        rows *= child.m[:, None] / rows.square().sum(1, keepdim=True).sqrt()


def uncalled(tower: Tower) -> Tower:
    """Make a tower look as if no layer's forward were called."""
    leaves = tuple(replace(leaf, order=None) for leaf in tower.anatomy.leaves)
    tower.anatomy = replace(tower.anatomy, leaves=leaves)
    return tower
