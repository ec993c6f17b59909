"""Where the branches of a block begin and end: the modules to hang something on, and how wide they are there."""

from __future__ import annotations

from torch import Tensor, nn

from lilt.towers.anatomy import Leaf
from lilt.towers.base import Tower

Site = tuple[str, int]  # path of a module, width of the tensor that is meant


def output_site(leaves: list[Leaf], role: str) -> Site | None:
    """Return the module whose output is the branch's, before the residual is added; None if no dense layer ends it."""
    out = next((leaf for leaf in leaves if leaf.role == role and leaf.part == "out"), None)
    if out is None:
        return None
    assert isinstance(out.module.weight, Tensor)
    width = out.module.weight.shape[1 if type(out.module).__name__ == "Conv1D" else 0]
    if out.order is not None:
        return out.path, width
    # nn.MultiheadAttention reads out_proj functionally: hook its own output instead
    return out.path.rpartition(".")[0], width


def input_site(tower: Tower, leaves: list[Leaf], role: str) -> Site | None:
    """Return the module whose input is the branch's, residual left out: its norm, or without one what reads first."""
    called = _called(tower, leaves)
    branch = [leaf for leaf in called if leaf.role == role]
    if not branch:
        return None
    before = called[: called.index(branch[0])]
    if called[0].role == "norm" and before[-1].role == "norm":
        norm = before[-1]  # pre-norm block: the hook on the norm leaves the residual alone
        return norm.path, int(next(norm.module.parameters(recurse=False)).shape[0])
    return read_site(tower, leaves, role)


def read_site(tower: Tower, leaves: list[Leaf], role: str) -> Site | None:
    """Return the module whose input is what the branch computes on, after a norm that stands before it."""
    branch = [leaf for leaf in _called(tower, leaves) if leaf.role == role]
    if not branch:
        return None
    if role == "mlp":
        return branch[0].path, _width_in(branch[0].module)
    # the module that holds the projections takes the input, so that q, k and v all see it
    source = next((leaf for leaf in leaves if leaf.role == role and leaf.part in ("q", "qkv")), branch[0])
    holder = source.path if isinstance(source.module, nn.MultiheadAttention) else source.path.rpartition(".")[0]
    return holder, _width_in(source.module)


def _called(tower: Tower, leaves: list[Leaf]) -> list[Leaf]:
    # a block's own tensors (gains) say nothing about the order of its parts
    called = [leaf for leaf in leaves if leaf.order is not None and leaf.path not in tower.anatomy.blocks]
    return sorted(called, key=lambda leaf: leaf.order or 0)


def _width_in(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    assert isinstance(module.weight, Tensor)
    return int(module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1])
