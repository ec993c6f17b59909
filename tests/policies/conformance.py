"""What the conformance suite runs over: every policy on every tower family, and the pairs that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lilt.policies import Plan, aliases, apply, parse_policy, plan, policies
from lilt.towers import Tower
from tests.towers.families import FAMILIES, SIDES, batch

SMALL = {"first": "first(1)", "last": "last(1)", "random": "random(0.3)"}  # what suits towers of two blocks
# every registered policy and alias, and the compositions and options that take another path through the code
SPECS = [
    *(SMALL.get(name, name) for name in (*policies.names(), *aliases)),
    "adapter(place=input)", "lora(targets=all)", "layernorm+bitfit", "lora(targets=q|v)+deep_adapter",
    "lora(targets=all|embed,dora=true)",
    "adapter(place=parallel)", "adapter(width=5,branches=mlp,init=lilt)", "prompt(2,deep)",
]  # fmt: skip
REFUSED: dict[str, tuple[str, ...]] = {
    "adapter": ("resnet", "own_mlp"),
    "adapter(place=input)": ("resnet", "own_mlp"),
    "adapter(place=parallel)": ("resnet", "own_mlp"),
    "adapter(width=5,branches=mlp,init=lilt)": ("resnet", "own_mlp"),
    "attention": ("convnext", "resnet", "own_mlp"),
    "bitfit": ("t5", "llama", "modernbert"),
    "blocks": ("own_mlp",),
    "deep_adapter": ("swin", "swinv2", "convnext", "resnet", "own_mlp"),
    "first(1)": ("own_mlp",),
    "ia3": ("resnet",),
    "last(1)": ("own_mlp",),
    "layernorm": ("own_mlp",),
    "layernorm+bitfit": ("own_mlp", "t5", "llama", "modernbert"),
    "lilt": ("resnet", "own_mlp"),
    "lora": ("convnext", "resnet", "own_mlp"),
    "lora(targets=q|v)+deep_adapter": ("swin", "swinv2", "convnext", "resnet", "own_mlp"),
    "mlp": ("resnet",),
    "peft": (
        "dinov3",
        "eva02",
        "beit",
        "swinv2",
        "resnet",
        "open_clip_vision",
        "own_vision",
        "open_clip_text",
        "own_text",
    ),
    "prompt": ("beit", "swin", "swinv2", "convnext", "resnet", "own_mlp"),
    "prompt(2,deep)": ("beit", "swin", "swinv2", "convnext", "resnet", "own_mlp"),
}
SWITCHLESS = ("mpnet", "own_vision", "own_mlp", "own_text")  # no gradient checkpointing in the library
PAIRS = [(spec, family) for family in FAMILIES for spec in SPECS if family not in REFUSED.get(spec, ())]
UNTRAINED = {("frozen", "vision"), ("frozen", "text"), ("lit", "vision"), ("lit_mirror", "text")}
# one spec for each way in which a policy reaches a tower: those that only open parameters differ in their choice alone
MECHANISMS = (
    "full", "layernorm", "lora", "lora(targets=all|embed,dora=true)", "ia3", "adapter", "adapter(place=input)",
    "adapter(place=parallel)", "deep_adapter", "prompt", "prompt(2,deep)", "peft",
)  # fmt: skip
TRAINING = [(s, f) for s, f in PAIRS if (s, SIDES[f]) not in UNTRAINED]


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


def moved_in_proportion(tune: Callable[[], Tower], plain: Tower) -> int:
    """Rescale and fold what a policy did; return how many weights moved, each along the line to the tuned ones."""
    states = []
    for factor in (0.0, 1.0, 0.3):
        tower = tune()
        edits: list[Any] = list(dict.fromkeys((tower.fates or {}).values()))
        for edit in edits:
            edit.rescale(tower.body, factor)
        for edit in edits:
            edit.fold(tower.body)
        states.append(tower.body.state_dict())
    moved = 0
    for name, base in plain.body.named_parameters():
        none, whole, part = (state[name] for state in states)
        torch.testing.assert_close(none, base)
        torch.testing.assert_close(part, base + 0.3 * (whole - base), rtol=1e-4, atol=1e-5)
        moved += not torch.allclose(whole, base)
    return moved
