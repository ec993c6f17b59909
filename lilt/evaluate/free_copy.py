"""A copy of a tower as it is in a run, free to be trained by another policy."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from lilt.evaluate.subject import Subject
from lilt.policies import apply, merge, parse_policy, plan
from lilt.policies.attach import Child
from lilt.towers import Tower


def free_copy(subject: Subject, side: str, policy: str) -> Tower:
    """Return a copy of a tower as it is now, with a policy on it; the tower itself stays as it is.

    What its own policy added is folded into the weights of the copy, or stays as a frozen part where it cannot be.
    """
    tower: Tower = getattr(subject.core, side)
    config = subject.model.config
    own = parse_policy(config.policies[side], side)
    parts = parse_policy(policy, side)
    if subject.is_base:
        free = subject.built_anew(side)
    elif all(part.mergeable for part in own):
        free = merge.merged(tower, own)
    else:
        free = copy.deepcopy(tower, {id(tower.contract): tower.contract}).requires_grad_(False)
        _set_aside(free)
        free.fates = None
    stays = "+".join(part.name for part in own if not part.mergeable and not subject.is_base)
    try:
        joint = plan(parts, free)
    except ValueError as error:
        if not stays:
            raise
        raise ValueError(
            f"{error} The {stays} of the run is still in the tower, as no weight can hold it; expected a "
            "policy that works beside it; try layernorm, bitfit or full"
        ) from error
    apply(joint, free)
    return free.to(next(tower.parameters()).device)


def _set_aside(tower: Tower) -> None:
    """Give the children that a policy has hung into a tower other names, so that there is place for their like."""
    for module in list(tower.body.modules()):
        hooks = module._forward_pre_hooks, module._forward_hooks
        for name, child in list(module.named_children()):
            mine = [(some, key, hook) for some in hooks for key, hook in some.items() if _runs(hook, name)]
            if isinstance(child, Child) and mine:
                del module._modules[name]
                child.name = f"{name}_before"
                module.add_module(child.name, child)
                for some, key, hook in mine:
                    some[key] = replace(hook, name=child.name)


def _runs(hook: Any, name: str) -> bool:
    return getattr(hook, "name", None) == name
