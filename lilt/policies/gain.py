"""Factors on a layer's output or input, or on the weight and the bias of a layer that is read functionally."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilt.policies.attach import Child
from lilt.policies.edits import Attach, Edit, Reparametrize, parametrizations, reparametrize, restore


class Gain(Child):
    """y -> l * y on the last axis, where l is learned for `size` channels and one before and after them."""

    def __init__(self, size: int, before: int, after: int, axis: int):
        super().__init__()
        self.pad = (before, after)
        self.axis = axis  # of the stored weight, along which its channels lie
        self.l = nn.Parameter(torch.ones(size))

    def forward(self, *tensors: Tensor) -> Tensor:
        hidden = tensors[-1]  # the input alone, or (input, output) of a hooked module
        return (hidden * self.all()).to(hidden.dtype)  # bf16 has no factor between 1 and 1.008

    def all(self) -> Tensor:
        """Return the factors of all channels."""
        return F.pad(self.l, self.pad, value=1.0) if any(self.pad) else self.l

    def fold(self, weight: Tensor) -> Tensor:
        return weight * self.all().unsqueeze(1 - self.axis)

    def rescale(self, factor: float) -> None:
        self.l.data.sub_(1).mul_(factor).add_(1)


class GainInWeight(Gain):
    """W -> l * W, for a weight that nobody's forward reads."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] if self.off else self.fold(tensors[0])


class Bias(NamedTuple):
    """A bias that the factors l[first:last] multiply from entry `at` on; inside: by a parametrization of it."""

    path: str
    tensor: str
    first: int
    last: int
    at: int
    inside: bool


class GainOfBias(Child):
    """b -> l * b with the factors of a weight's gain; it owns nothing."""

    def __init__(self, gain: Gain, bias: Bias):
        super().__init__()
        self.gain = (gain,)  # in a tuple a module is a reference, not a child
        self.bias = bias

    def forward(self, bias: Tensor) -> Tensor:
        return bias if self.gain[0].off else self.fold(bias)

    def fold(self, weight: Tensor) -> Tensor:
        factors = self.gain[0].l[self.bias.first : self.bias.last]
        return weight * F.pad(factors, (self.bias.at, len(weight) - self.bias.at - len(factors)), value=1.0)


@dataclass(frozen=True)
class ScaleOutput(Attach):
    """Multiply what a layer gives, and what is added to it elsewhere."""

    biases: tuple[Bias, ...] = ()

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        trained = super().carry_out(body)
        _tie(body, self.child(body), self.biases)
        return trained

    def fold(self, body: nn.Module) -> None:
        _fold_biases(body, self.child(body), self.biases)
        super().fold(body)


@dataclass(frozen=True)
class ScaleInside(Reparametrize):
    """Multiply a weight that is read functionally, and the biases added to its product."""

    biases: tuple[Bias, ...] = ()

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        trained = super().carry_out(body)
        _tie(body, self.child(body), self.biases)
        return trained

    def fold(self, body: nn.Module) -> None:
        if parametrize.is_parametrized(body.get_submodule(self.path), self.tensor):
            _fold_biases(body, self.child(body), self.biases)
            super().fold(body)


@dataclass(frozen=True)
class Hold(Edit):
    """Keep a parameter, which another edit changes too, from other policies."""

    @property
    def claim(self) -> str:
        return self.path

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        return ()

    def switch(self, body: nn.Module, on: bool) -> None:
        pass

    def fold(self, body: nn.Module) -> None:
        pass

    def rescale(self, body: nn.Module, factor: float) -> None:
        pass


def _tie(body: nn.Module, gain: Child, biases: tuple[Bias, ...]) -> None:
    assert isinstance(gain, Gain)
    for bias in biases:
        if bias.inside:
            reparametrize(body.get_submodule(bias.path), bias.tensor, GainOfBias(gain, bias))


@torch.no_grad()
def _fold_biases(body: nn.Module, gain: Child, biases: tuple[Bias, ...]) -> None:
    assert isinstance(gain, Gain)
    for bias in reversed(biases):
        module = body.get_submodule(bias.path)
        if not bias.inside:  # a layer that is called adds it before its output is multiplied
            _multiply(getattr(module, bias.tensor), GainOfBias(gain, bias))
        elif parametrize.is_parametrized(module, bias.tensor):  # not yet folded together with another weight's part
            children: Any = parametrizations(module)[bias.tensor]
            for child in children:
                _multiply(children.original, child)
            restore(module, bias.tensor)


def _multiply(bias: Tensor, child: GainOfBias) -> None:
    wide = torch.promote_types(bias.dtype, torch.float32)
    bias.copy_(child.fold(bias.to(wide)).to(bias.dtype))
