"""A tuned tower on its way back: folded into a plain one, switched off for a while, or halfway to its base."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilt.policies.attach import Child
from lilt.policies.base import Policy
from lilt.policies.edits import Edit, Open
from lilt.towers import Tower, build_tower
from lilt.towers.base import fingerprint


def edits_of(tower: Tower) -> list[Edit]:
    """Return the edits that were carried out on a tower, each once and in their order."""
    return list(dict.fromkeys((tower.fates or {}).values()))


def changed(tower: Tower) -> dict[str, Open]:
    """Return the base weights that a policy trains in place, by their name in the tower now."""
    return {name: edit for name, edit in (tower.fates or {}).items() if isinstance(edit, Open)}


@torch.no_grad()
def merged(tower: Tower, parts: Iterable[Policy]) -> Tower:
    """Return a plain copy of a tower, frozen and in eval mode: what its policies added is folded in, in fp32 or wider.

    Its body has the classes and keys of the library, and the copy takes a policy again.
    Raises ValueError where a policy adds what no weight can hold.
    """
    stuck = [part.name for part in parts if not part.mergeable]
    if stuck:
        raise ValueError(
            f"{'+'.join(stuck)} cannot be merged into the {tower.side} tower {tower.spec!r}: it adds what no weight of "
            "the tower can hold. Expected policies that lilt policies marks as merging; keep the run folder and "
            "lilt.load it, or train one of those"
        )
    # the contract is what goes into a tower and no part of it; tokenizers are not always fit for copying
    plain = copy.deepcopy(tower, {id(tower.contract): tower.contract})
    _own_classes(plain.body)
    # backwards, as several weights of one module come back to their places
    for edit in reversed(edits_of(plain)):
        edit.fold(plain.body)
    plain.fates = None
    plain.requires_grad_(False).eval()
    plain.fingerprint = fingerprint(plain.body)
    if plain.fingerprint != tower.fingerprint:
        plain.spec = f"module:{type(plain.body).__name__}"  # nobody builds it from the old spec
    return plain


def base_of(tower: Tower, given: nn.Module | None, contract: Any, image_px: int | None = None) -> nn.Module | None:
    """Return the body with the weights from before training, or None where a policy left them all alone.

    It is built anew from the tower's spec, or from the module given, which stays as it is.
    Raises ValueError when there is neither, or when the weights are not those the tower was built with.
    """
    if not changed(tower):
        return None
    if given is None and tower.spec.startswith("module:"):
        rules = "+".join(dict.fromkeys(edit.rule for edit in changed(tower).values()))
        raise ValueError(
            f"{rules} changed weights of the {tower.side} tower, which was passed as a module ({tower.spec}) and "
            f"cannot be built anew; the base is needed: pass the module as it was before training, {tower.side}=module"
        )
    what = tower.spec if given is None else copy.deepcopy(given)
    base = build_tower(what, tower.side, contract, image_px, tower.roles)
    found = fingerprint(base.body)
    if found != tower.fingerprint:
        raise ValueError(
            f"the base of the {tower.side} tower {tower.spec!r} has other weights than the tower was built with "
            f"(fingerprint {found[:12]}, expected {tower.fingerprint[:12]}); restore them, or pass the module as it "
            f"was, {tower.side}=module"
        )
    return base.body


@contextmanager
def disabled(tower: Tower, base: nn.Module | None) -> Iterator[None]:
    """Let a tower give the outputs of its base: its children do nothing and changed weights have the base's values."""
    with ExitStack() as stack:
        stack.enter_context(_base_values(tower, base))
        stack.enter_context(_switched_off(tower))
        stack.enter_context(_without_hooks(tower.body))
        yield


@torch.no_grad()
def interpolate(tower: Tower, base: nn.Module | None, scale: float) -> None:
    """Move a tower in place to base + scale * (tuned - base): 1 changes no bit, 0 gives the base's outputs.

    Raises ValueError, with the tower as it was, where a policy added what works whole or not at all.
    """
    check_scalable(tower, scale)
    if scale == 1:
        return  # a magnitude multiplied by 1 in its own way may round
    for parameter, value in _pairs(tower, base):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        # lerp is exact at both ends
        parameter.copy_(torch.lerp(value.to(wide), parameter.to(wide), scale))
    for edit in edits_of(tower):
        edit.rescale(tower.body, scale)


def check_scalable(tower: Tower, scale: float) -> None:
    """Raise ValueError where `interpolate` would; of two towers both can be asked before one is moved."""
    for edit in edits_of(tower):
        edit.check_scalable(scale)


def _pairs(tower: Tower, base: nn.Module | None) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each changed parameter with its value in the base, on the same device and in the same type."""
    pairs = []
    for name, edit in changed(tower).items():
        assert base is not None, "base_of gives one where weights were changed"
        parameter = tower.body.get_parameter(name)
        pairs.append((parameter, base.get_parameter(edit.path).detach().to(parameter.device, parameter.dtype)))
    return pairs


def _own_classes(body: nn.Module) -> None:
    """Part a copy from its original: both have one class for a parametrized module, and folding takes from it."""
    for module in body.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


@contextmanager
def _base_values(tower: Tower, base: nn.Module | None) -> Iterator[None]:
    tuned = []
    try:
        for parameter, value in _pairs(tower, base):
            tuned.append((parameter, parameter.data))
            parameter.data = value  # exchanged, not copied: the tuned values are not touched
        yield
    finally:
        for parameter, value in tuned:
            parameter.data = value


@contextmanager
def _switched_off(tower: Tower) -> Iterator[None]:
    edits = edits_of(tower)
    try:
        for edit in edits:
            edit.switch(tower.body, on=False)
        yield
    finally:
        for edit in edits:
            edit.switch(tower.body, on=True)


@contextmanager
def _without_hooks(body: nn.Module) -> Iterator[None]:
    """Take the children's hooks away: torch's own layers compute in another order where any hook hangs in them."""
    taken = []
    try:
        for module in body.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before = dict(hooks)
                for key, hook in before.items():
                    if isinstance(getattr(module, str(getattr(hook, "name", "")), None), Child):
                        del hooks[key]
                if len(hooks) < len(before):
                    taken.append((hooks, before, set(before) - set(hooks)))
        yield
    finally:
        for hooks, before, ours in taken:
            # in their old order, without those that somebody removed and with those that somebody added meanwhile
            order = {key: hook for key, hook in before.items() if key in ours or key in hooks} | hooks
            hooks.clear()
            hooks.update(order)
