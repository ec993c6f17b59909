"""Where a model with both sides turns from tokens to one vector, found by watching it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from lilt.towers.calls import Traced, trace


class Seam(NamedTuple):
    """Which module gives the last tokens (B, L, width), or a map, and what a pooled one goes through, in order.

    behind: modules, or a matrix that the body multiplies with by itself, by their paths.
    """

    at: str
    width: int
    behind: tuple[str, ...]

    def steps(self, body: nn.Module) -> tuple[nn.Module | nn.Parameter, ...]:
        """Return what is behind."""
        matrices = dict(body.named_parameters(recurse=False))
        return tuple(matrices[path] if path in matrices else body.get_submodule(path) for path in self.behind)


def find_seam(body: nn.Module, forward: Callable[[], Tensor]) -> Seam | None:
    """Run a body once, which gives joint vectors (1, D), and return its seam; None where no module gives tokens.

    What was found is to be proven: it is where the seam is in models that pool by picking or by a mean.
    """
    said: list[Tensor] = []
    calls = trace(body, lambda: said.append(forward()), _noted)
    calls.sort(key=lambda call: call.ended, reverse=True)
    rows, behind = _back(calls, said[0])
    given = [(call.path, call.gave) for call in calls if isinstance(call.gave, tuple)]
    if not behind:
        for name, matrix in body.named_parameters(recurse=False):
            at = _last(given, matrix.shape[0]) if matrix.ndim == 2 and matrix.shape[1] == rows.shape[-1] else None
            if at is not None:
                return Seam(at, matrix.shape[0], (name,))
    at = _last(given, rows.shape[-1])
    return None if at is None else Seam(at, rows.shape[-1], behind)


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor among the values that a module takes or gives."""
    if isinstance(values, Mapping):
        values = tuple(values.values())
    several = values if isinstance(values, Sequence) else (values,)
    return next((value for value in several if isinstance(value, Tensor)), None)


def _noted(values: Any) -> Any:
    """Keep rows of features themselves, so that they are known again; of anything larger its shape, which is small."""
    first = first_tensor(values)
    if first is None:
        return None
    return first if first.ndim == 2 and first.is_floating_point() else tuple(first.shape)


def _back(calls: Sequence[Traced], joint: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Follow joint vectors back, from module to module, to the rows which no module made of rows."""
    rows, behind = joint, tuple[str, ...]()
    for call in calls:  # of several that give the same, the outermost ends last
        if call.gave is rows and isinstance(call.given, Tensor) and call.given is not rows:
            rows, behind = call.given, (call.path, *behind)
    return rows, behind


def _last(given: Sequence[tuple[str, tuple[int, ...]]], width: int) -> str | None:
    """Return the module that was the last to give tokens (1, L, width) or a map (1, width, H, W), (1, H, W, width).

    One token or cell alone is what was pooled already.
    """
    for path, shape in given:
        is_tokens = len(shape) == 3 and shape[2] == width
        if (is_tokens or (len(shape) == 4 and width in shape[1::2])) and prod(shape) > width:
            return path
    return None
