"""Proof, before a step is spent, that every trained tensor moves the output of its tower."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from lilt import distributed
from lilt.towers.anatomy import is_attention
from lilt.towers.base import ImageContract, Inputs, Tower

CAPTIONS = ("two dogs", "a red boat on the river", "an old man reads in front of a small shop in the rain")
_STILL = 1e-6  # of the largest output: what a kernel may differ by between two runs on the same numbers
_KEY_NORM = re.compile(r"^(k|key)_?(layer_?)?(norm|ln)$|^(norm|layer_?norm|ln)_?(k|key)$", re.I)
# what peft puts into the name of a bias: around its module, or in the place of it
_WRAPPED = re.compile(r"(base_layer|original_module|(modules_to_save|ln_tuning_layers|lora_B)\.\w+)\.")
_BEFT = re.compile(r"\.beft_bias\.\w+$")
_SHOWN = 6


def check_alive(tower: Tower) -> None:
    """Raise ValueError naming the trained tensors that do not move the tower's output; the tower stays as it is.

    Costs a forward and backward of two images or three captions, on the tower's device and in eval mode, and two more
    forwards for each tensor without a gradient. Every rank comes to the same result.
    """
    if dead := find_dead(tower):
        raise _refusal(tower, dead)


def find_dead(tower: Tower) -> list[str]:
    """Return the names of the trained tensors of the body that do not move the output; the tower stays as it is."""
    trained = {name: p for name, p in tower.body.named_parameters() if p.requires_grad and p.numel()}
    if not trained:
        return []
    device = next(iter(trained.values())).device
    chance = torch.Generator(device).manual_seed(0)
    # gradients are on from here, whatever the caller's mode
    with torch.inference_mode(False), _own_chance(device), _awake(tower, chance):
        inputs = _noise(tower, device, chance)
        _backward(tower, inputs, chance)
        found = read_gradients(trained)
        doubtful = found.missing | (found.zero - dead_by_nature(tower))
        return [name for name in trained if name in doubtful and not _moves(tower, inputs, trained[name], chance)]


def dead_by_nature(tower: Tower) -> set[str]:
    """Return the parameters whose gradient may be zero by their role: a softmax does not see a shift of all its logits.

    They are the biases of attention keys, of the map that makes them or of the norm on them (as a third of a fused bias
    they are part of a tensor that lives), and of what else an attention holds beside q, k, v and its output: maps of
    relative positions or between heads, which add to the logits.
    """
    found = set()
    # by role too: an attention that a role map names has a class of any name
    mixers = {path for leaf in tower.anatomy.leaves if leaf.role == "attention" for path in (leaf.path, leaf.holder)}
    for leaf in tower.anatomy.leaves:
        inside = leaf.holder in mixers or is_attention(tower.body.get_submodule(leaf.holder))
        key_norm = leaf.role == "norm" and inside and _KEY_NORM.match(leaf.path.rpartition(".")[2])
        if key_norm or (leaf.role == "attention" and leaf.part in ("k", "")):
            found.add(_unwrapped(f"{leaf.path}.bias"))
    return {name for name, _ in tower.body.named_parameters() if _unwrapped(name) in found}


def _unwrapped(name: str) -> str:
    return _WRAPPED.sub("", _BEFT.sub(".bias", name))


class Gradients(NamedTuple):
    """Which parameters have no gradient, which have one of zeros alone, and whether all values are finite."""

    missing: set[str]
    zero: set[str]
    finite: bool


def read_gradients(parameters: dict[str, nn.Parameter]) -> Gradients:
    """Read the gradients that a backward left, this rank's share of them, with a single wait for the device."""
    given = {name: distributed.ours(p.grad) for name, p in parameters.items() if p.grad is not None}
    told: Any = [torch.stack([gradient.any(), gradient.isfinite().all()]) for gradient in given.values()]
    told = torch.stack(told).tolist() if told else []
    zero = {name for name, (some, _) in zip(given, told, strict=True) if not some}
    return Gradients(parameters.keys() - given.keys(), zero, all(finite for _, finite in told))


def _own_chance(device: torch.device) -> AbstractContextManager[None]:
    """Give back the global random state, for forwards and transforms that draw from it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def _awake(tower: Tower, chance: torch.Generator) -> Iterator[None]:
    """Put the tower into eval mode, with random numbers where all are zero; put everything back afterwards.

    Zero gains, and zero partners such as the B of LoRA, hide what lies behind them.
    """
    modes = [(module, module.training) for module in tower.modules()]
    gradients = [(p, p.grad) for p in tower.parameters() if p.requires_grad]
    floating = [p for p in tower.parameters() if p.is_floating_point() and p.numel()]
    some = torch.stack([p.detach().any() for p in floating]).tolist()
    zeros = [(p, p.detach().clone()) for p, nonzero in zip(floating, some, strict=True) if not nonzero]
    try:
        for module, _ in modes:
            module.training = False  # the flag alone: somebody's train() and eval() may do more than that
        for parameter, _ in gradients:
            parameter.grad = None
        for parameter, _ in zeros:
            parameter.data.normal_(0, 0.3, generator=chance)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, value in zeros:
            parameter.data.copy_(value)  # a zero has a sign


def _noise(tower: Tower, device: torch.device, chance: torch.Generator) -> Inputs:
    """Return two images of noise in the tower's size, or captions of several lengths through its tokenizer."""
    contract = tower.contract
    if not isinstance(contract, ImageContract):
        return {name: ids.to(device) for name, ids in contract.pad(contract.encode(CAPTIONS)[0]).items()}
    if contract.transform is None:
        return torch.randn(2, 3, contract.image_px, contract.image_px, generator=chance, device=device)
    pixels = torch.randint(256, (2, 64, 64, 3), generator=chance, device=device).to("cpu", torch.uint8).numpy()
    return torch.stack([contract.transform(Image.fromarray(picture)) for picture in pixels]).to(device)


def _backward(tower: Tower, inputs: Inputs, chance: torch.Generator) -> None:
    """Run backward from a random direction of the output, which no symmetry makes flat."""
    out = tower(inputs)
    if not out.isfinite().all():
        what = "two images of noise" if tower.side == "vision" else "three captions"
        raise ValueError(
            f"the {tower.side} tower {tower.spec!r} gives values that are not finite for {what}; expected numbers; "
            "check its weights"
        )
    if out.requires_grad:
        (out * torch.randn(out.shape, generator=chance, device=out.device)).sum().backward()


@torch.no_grad()
def _moves(tower: Tower, inputs: Inputs, parameter: nn.Parameter, chance: torch.Generator) -> bool:
    """Say whether a random change of one tensor changes the output."""
    with _own_chance(parameter.device):  # a tower that draws numbers draws the same again
        before = tower(inputs)
    value = parameter.detach().clone()
    # large, so that it crosses thresholds too: a ReLU that never fires has no gradient
    change = torch.empty_like(value).normal_(generator=chance) * (1 + 2 * value.abs().max())
    try:
        parameter.data.add_(change)
        moved = (tower(inputs) - before).abs().max()
    finally:
        parameter.data.copy_(value)
    return not moved <= _STILL * before.abs().max()  # a value that is not finite has moved


def _refusal(tower: Tower, dead: list[str]) -> ValueError:
    rules: dict[str, list[str]] = {}
    for name in dead:
        edit = (tower.fates or {}).get(name)
        rules.setdefault(f"{edit.rule} ({edit.why})" if edit else "no policy", []).append(name)
    said = "; ".join(f"{rule} trains {listed(names)}" for rule, names in rules.items())
    return ValueError(
        f"{said}, and the output of the {tower.side} tower {tower.spec!r} does not move when they change: "
        f"{_reason(tower, dead[0])}. Expected every trained tensor to matter; choose a policy, roles or blocks without "
        "them, or a pool that reads them"
    )


def listed(names: list[str]) -> str:
    """Return names in a line, the first of many."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _reason(tower: Tower, name: str) -> str:
    """Say why a tensor is dead, as far as the anatomy tells."""
    above = [leaf for leaf in tower.anatomy.leaves if f".{name}".startswith(f".{leaf.path}.".replace("..", "."))]
    leaf = max(above, key=lambda leaf: len(leaf.path), default=None)
    if leaf is not None and leaf.order is None:
        return f"the forward of {leaf.path} ({type(leaf.module).__name__}) is never called"
    return f"in eval mode, with pool={tower.pool}, nothing depends on {name}"
