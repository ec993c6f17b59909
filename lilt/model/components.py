"""From `name(key=value)` to a part of the model that knows the widths below it."""

from __future__ import annotations

import inspect
from typing import TypeVar

from torch import nn

from lilt.registry import Registry, construct, parse_call

M = TypeVar("M", bound=nn.Module)


def build_component(registry: Registry[type[M]], spec: str, **widths: int) -> M:
    """Build a registered module: its options come from the spec, and of the widths those that it asks for."""
    call = parse_call(spec)
    cls = registry[call.name]
    signature = inspect.signature(cls.__init__, eval_str=True).parameters
    asked = {name: width for name, width in widths.items() if name in signature}
    options = {name: p.annotation for name, p in signature.items() if name not in ("self", *asked)}
    return construct(lambda **given: cls(**asked, **given), call, options)
