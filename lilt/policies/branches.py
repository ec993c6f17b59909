"""Where the branches of a block begin and end: the modules to hang something on, and how wide they are there."""

from __future__ import annotations

from torch import Tensor, nn

from lilt.towers.anatomy import Leaf, is_dense
from lilt.towers.base import Tower

Site = tuple[str, int]  # path of a module, width of the tensor that is meant
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def output_site(tower: Tower, leaves: list[Leaf], role: str) -> Site | None:
    """Return the module whose output is the branch's, before the residual is added.

    None if no dense layer ends it, unless one module is all of it.
    """
    out = next((leaf for leaf in leaves if leaf.role == role and leaf.part == "out"), None)
    if out is None:
        return _whole(tower, leaves, role)
    assert isinstance(out.module.weight, Tensor)
    width = out.module.weight.shape[1 if type(out.module).__name__ == "Conv1D" else 0]
    if out.order is not None:
        return out.path, width
    # nn.MultiheadAttention reads out_proj functionally: hook its own output instead
    return out.holder, width


def input_site(tower: Tower, leaves: list[Leaf], role: str) -> Site | None:
    """Return the module whose input is the branch's, residual left out: its norm, or without one what reads first.

    None if its channels are not the last axis.
    """
    called = _called(tower, leaves)
    branch = [leaf for leaf in called if leaf.role == role]
    if not branch:
        return None
    before = called[: called.index(branch[0])]
    if called[0].role != "norm" or before[-1].role != "norm":
        return read_site(tower, leaves, role)
    norm = before[-1]  # pre-norm block: the hook on the norm leaves the residual alone
    gain = max(norm.module.parameters(recurse=False), key=Tensor.numel)
    last = gain.shape[-1:] in ((), (gain.numel(),)) and not all(isinstance(x.module, CONVOLUTIONS) for x in branch)
    # one factor for all channels does not say how many they are
    width = gain.numel() if gain.numel() > 1 else norm.reads
    return (norm.path, width) if last and width else None


def read_site(tower: Tower, leaves: list[Leaf], role: str) -> Site | None:
    """Return the module whose input is what the branch computes on, after a norm.

    None if no dense layer reads it, unless one module is all of the branch.
    """
    branch = [leaf for leaf in _called(tower, leaves) if leaf.role == role]
    if not branch:
        return None
    source = branch[0]
    if role == "attention":
        source = next((leaf for leaf in leaves if leaf.role == role and leaf.part in ("q", "qkv")), source)
    if isinstance(source.module, nn.MultiheadAttention):
        return source.path, source.module.embed_dim
    if not is_dense(source.module):
        return _whole(tower, leaves, role)
    assert isinstance(source.module.weight, Tensor)
    width = int(source.module.weight.shape[0 if type(source.module).__name__ == "Conv1D" else 1])
    # the module that holds the projections takes the input, so that q, k and v all see it
    return (source.path if role == "mlp" else source.holder), width


def _whole(tower: Tower, leaves: list[Leaf], role: str) -> Site | None:
    """Return the one module that is all of a branch and turns tokens (B, L, D) into others of that width."""
    branch = [leaf for leaf in _called(tower, leaves) if leaf.role == role]
    if len(branch) != 1 or branch[0].reads is None or branch[0].reads != branch[0].gives:
        return None
    return branch[0].path, branch[0].reads


def _called(tower: Tower, leaves: list[Leaf]) -> list[Leaf]:
    # a block's own tensors (gains) say nothing about the order of its parts
    called = [leaf for leaf in leaves if leaf.order is not None and leaf.path not in tower.anatomy.blocks]
    return sorted(called, key=lambda leaf: leaf.order or 0)
