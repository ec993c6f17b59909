"""What a tower is made of: its blocks, and the role of every module and parameter, found by type and by one forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lilt.towers.calls import watch
from lilt.towers.packing import keep_padding

CONTAINERS = (nn.ModuleList, nn.Sequential)
ROLES = ("norm", "attention", "mlp", "conv", "embedding", "other")
# Inside an attention module (known by type) the maps are told apart by the field they are assigned to.
_QKV = {
    "q": re.compile(r"^(q|query|q_proj|q_lin|to_q|wq)$", re.I),
    "k": re.compile(r"^(k|key|k_proj|k_lin|to_k|wk)$", re.I),
    "v": re.compile(r"^(v|value|v_proj|v_lin|to_v|wv)$", re.I),
    "kv": re.compile(r"^(w?kv|kv_proj|kv_lin|key_value|to_kv)$", re.I),
    "qkv": re.compile(r"^(w?qkv|qkv_proj|in_proj|query_key_value|c_attn|to_qkv)$", re.I),
}


@dataclass(frozen=True)
class Leaf:
    """A module that owns parameters: where it is, what it does, and when (if at all) its forward is called."""

    path: str
    module: nn.Module
    role: str
    part: str  # q k v kv qkv out (attention), in out (mlp), or ""
    block: int | None
    order: int | None  # None: its forward never fires, its weights are read functionally
    reads: int | None = None  # D of the tokens (B, L, D) that its forward takes, and of those it gives; None: others
    gives: int | None = None

    @property
    def holder(self) -> str:
        """The path of the module that it is a part of."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Named:
    """What a role map says of one network: role words by the id of a module, and the ids of the blocks."""

    words: Mapping[int, str]
    blocks: frozenset[int]


NOTHING = Named({}, frozenset())


@dataclass(frozen=True)
class Anatomy:
    """The leaves of a tower in registration order and the paths of its blocks in depth order."""

    leaves: tuple[Leaf, ...]
    blocks: tuple[str, ...]
    token_width: int | None = None  # D of the tokens (B, L, D) that the last block gives; None: it gives no tokens

    def describe(self) -> str:
        """Say in a few words what the tower has, for error messages."""
        names: dict[str, list[str]] = {}
        for leaf in self.leaves:
            names.setdefault(leaf.role, []).append(type(leaf.module).__name__)
        parts = [f"{role} ({_tally(names[role])})" for role in ROLES if role in names]
        return f"{len(self.blocks)} blocks with " + ", ".join(parts)


def _tally(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a normalisation: by its class, owning vectors only, be they (D,) or (1, D, 1, 1)."""
    vectors = all(t.numel() == max(t.shape, default=1) for t in module.parameters(recurse=False))
    return bool(re.search(r"norm", type(module).__name__, re.I)) and vectors


def is_attention(module: nn.Module) -> bool:
    """Say whether a module's class is an attention."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.MultiheadAttention) or "attention" in name or name.endswith("attn")


def is_dense(module: nn.Module) -> bool:
    """Say whether a module is an affine map of the last axis: Linear, or the transposed Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def find_blocks(body: nn.Module) -> list[str]:
    """Return the paths of the repeated units of a network in depth order: the innermost lists of one class."""
    found: list[str] = []
    for path, module in body.named_modules():
        if not isinstance(module, CONTAINERS) or not len(module):
            continue
        children = list(module.children())
        alike = len({type(c) for c in children}) == 1 and not isinstance(children[0], CONTAINERS)
        if alike and any(True for _ in children[0].children()) and any(True for _ in children[0].parameters()):
            found += [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
    # a stage that holds blocks is not itself a block
    return [path for path in found if not any(other.startswith(path + ".") for other in found)]


def survey(body: nn.Module, forward: Callable[[], Any], named: Named = NOTHING) -> Anatomy:
    """Find the blocks and the role of every parameter-owning module; forward runs the network on an example.

    What a role map names is taken from it, the rest found by type. Torch's encoders keep their padding from now on.
    """
    keep_padding(body)
    modules = dict(body.named_modules())
    blocks = [path for path, module in modules.items() if id(module) in named.blocks] or find_blocks(body)
    calls = watch(body, forward)
    silent = [path for path in blocks if path not in calls]
    if named.blocks and silent:
        raise ValueError(
            f"roles: {silent[0]!r} is named block and its forward is never called, so it has no place in depth; "
            "expected modules that run one after the other; name the modules inside it"
        )
    # registration order of the stages may differ from depth; the calls tell
    blocks.sort(key=lambda path: calls[path].order if path in calls else len(calls))
    leaves = []
    seen: set[int] = set()
    for path, module in modules.items():
        fresh = {id(p) for p in module.parameters(recurse=False)} - seen
        if not fresh:  # nothing of its own, or tied to an earlier module as T5's embeddings are
            continue
        seen |= fresh
        block = next((i for i, b in enumerate(blocks) if path == b or path.startswith(b + ".")), None)
        role, part = _said(path, modules, named)
        if not role:
            inside = _within_attention(path, blocks[block] if block is not None else "", modules)
            role = _role(module, block is not None, inside, bool(blocks))
        leaves.append(Leaf(path, module, role, part or _part(path, module, role), block, *calls.get(path, (None,))))
    last = calls.get(blocks[-1]) if blocks else None
    return Anatomy(tuple(_mark_outputs(leaves)), tuple(blocks), None if last is None else last.gives)


def _said(path: str, modules: dict[str, nn.Module], named: Named) -> tuple[str, str]:
    """Return the role and part that a role map gives a module: by its own line, or by that of the nearest around it."""
    names = path.split(".")
    for depth in range(len(names), 0, -1):
        word = named.words.get(id(modules[".".join(names[:depth])]), "")
        if word and (depth == len(names) or not is_norm(modules[path])):
            role, _, part = word.partition(".")
            return role, part
    return "", ""


def _within_attention(path: str, block: str, modules: dict[str, nn.Module]) -> bool:
    names = path.split(".")
    ancestors = [".".join(names[:i]) for i in range(1, len(names) + 1)]
    return any(is_attention(modules[a]) for a in ancestors if len(a) > len(block))


def _role(module: nn.Module, in_block: bool, in_attention: bool, has_blocks: bool) -> str:
    if is_norm(module):
        return "norm"
    if in_attention:
        return "attention"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_dense(module):
        return "mlp" if in_block or not has_blocks else "other"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv" if in_block or not has_blocks else "embedding"
    # bare tensors outside the blocks are class tokens and positions; inside they are gains
    return "other" if in_block else "embedding"


def _part(path: str, module: nn.Module, role: str) -> str:
    if role != "attention":
        return ""
    if isinstance(module, nn.MultiheadAttention):
        return "qkv"
    name = path.rpartition(".")[2]
    return next((part for part, pattern in _QKV.items() if is_dense(module) and pattern.match(name)), "")


def _mark_outputs(leaves: list[Leaf]) -> list[Leaf]:
    """Mark in each block the last dense layer of the attention and of the MLP as its output, an MLP's others as in."""
    said = {(leaf.block, leaf.role) for leaf in leaves if leaf.part == "out"}
    last: dict[tuple[int | None, str], int] = {}
    for i, leaf in enumerate(leaves):
        key = (leaf.block, leaf.role)
        if leaf.role in ("attention", "mlp") and is_dense(leaf.module) and leaf.part == "" and key not in said:
            best = leaves[last.get(key, i)]
            # what is read functionally counts as called before all others
            if (leaf.order is not None, leaf.order) >= (best.order is not None, best.order):
                last[key] = i
    marked = list(leaves)
    for i, leaf in enumerate(leaves):
        if i in last.values():
            marked[i] = replace(leaf, part="out")
        elif leaf.role == "mlp" and leaf.part == "":
            marked[i] = replace(leaf, part="in")
    return marked
