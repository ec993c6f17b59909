"""What the conformance suite runs over: every policy on every tower family, and the pairs that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lilt.policies import Plan, aliases, apply, parse_policy, plan, policies
from lilt.towers import Tower
from tests.towers.families import FAMILIES, SIDES, batch

# every registered policy and alias, and the compositions and options that take another path through the code
SPECS = [
    *(f"{name}(1)" if name == "last" else name for name in (*policies.names(), *aliases)),
    "adapter(place=input)", "lora(targets=all)", "layernorm+bitfit", "lora(targets=q|v)+deep_adapter",
]  # fmt: skip
REFUSED: dict[str, tuple[str, ...]] = {
    "adapter": ("resnet", "own_mlp"),
    "adapter(place=input)": ("resnet", "own_mlp"),
    "attention": ("convnext", "resnet", "own_mlp"),
    "bitfit": ("t5", "llama", "modernbert"),
    "deep_adapter": ("swin", "swinv2", "convnext", "resnet", "own_mlp"),
    "last(1)": ("own_mlp",),
    "layernorm": ("own_mlp",),
    "layernorm+bitfit": ("own_mlp", "t5", "llama", "modernbert"),
    "lilt": ("resnet", "own_mlp"),
    "lora": ("convnext", "resnet", "own_mlp"),
    "lora(targets=all)": ("resnet",),
    "lora(targets=q|v)+deep_adapter": ("swin", "swinv2", "convnext", "resnet", "own_mlp"),
    "mlp": ("resnet",),
}
SWITCHLESS = ("mpnet", "own_vision", "own_mlp", "own_text")  # no gradient checkpointing in the library
PAIRS = [(spec, family) for family in FAMILIES for spec in SPECS if family not in REFUSED.get(spec, ())]
TRAINING = [(s, f) for s, f in PAIRS if s != "frozen" and (s, SIDES[f]) != ("lit", "vision")]


def planned(spec: str, tower: Tower) -> Plan:
    return plan(parse_policy(spec, tower.side), tower)


def tuned(spec: str, tower: Tower, alive: bool = True) -> Tower:
    """Apply a policy; alive: with its zero-initialised tensors randomised, so that all of it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        apply(planned(spec, tower), tower)
        if alive:
            for tensor in trained(tower).values():
                if not tensor.any():
                    torch.nn.init.normal_(tensor, std=0.1)
    return tower


def trained(tower: Tower) -> dict[str, Tensor]:
    return {name: p for name, p in tower.body.named_parameters() if p.requires_grad}


def run_backward(tower: Tower, inputs: Any = None) -> Tensor:
    """Run forward and backward of a loss that no symmetry makes flat; return the output."""
    tower.zero_grad()
    out = tower(batch(tower) if inputs is None else inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * weights).sum().backward()
    return out.detach()


def dead_by_nature(tower: Tower) -> Iterator[str]:
    """Yield parameters whose gradient is zero by their role: a softmax does not see a shift of all its logits."""
    for leaf in tower.anatomy.leaves:
        if leaf.part == "k":
            yield f"{leaf.path}.bias"
