"""Fit ranks and widths to a budget of trained values."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from lilt.policies import policies
from lilt.registry import options_of, parse_call, split_top


def fitted_option(spec: str) -> tuple[int, str] | None:
    """Return which part of a spec has a size to fit and the name of that option.

    None where no part has one, where several have, and where a whole number was written out: that is a choice already.
    """
    found = []
    for at, text in enumerate(split_top(spec, "+")):
        call = parse_call(text)
        if call.name not in policies:
            continue  # an alias is a fixed composition
        cls = policies[call.name]
        if cls.size is None:
            continue
        kinds = options_of(cls)
        given = {*list(kinds)[: len(call.args)], *call.kwargs}
        if any(int in (kinds[key], *get_args(kinds[key])) for key in given):
            return None
        found.append((at, cls.size))
    return found[0] if len(found) == 1 else None


def with_size(spec: str, at: int, option: str, size: int) -> str:
    """Write a size into one part of a spec."""
    parts = split_top(spec, "+")
    call = parse_call(parts[at])
    options = [*call.args, *(f"{key}={value}" for key, value in call.kwargs.items()), f"{option}={size}"]
    parts[at] = f"{call.name}({','.join(options)})"
    return "+".join(parts)


def fit(spec: str, within: Callable[[str], bool], most: int) -> str:
    """Return the spec with the largest size up to most that is within the budget, or with size 1 if none is.

    A spec without a size to fit is returned as it is. within says whether a spec is; more of a size trains more values.
    """
    option = fitted_option(spec)
    if option is None:
        return spec

    def sized(size: int) -> str:
        return with_size(spec, *option, size)

    low, high = 0, 1
    while high <= most and within(sized(high)):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(sized(middle)) else (low, middle)
    return sized(max(low, 1))
