"""What a policy can do to a tower: open a parameter, hang a child on a module, or put one inside a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilt.policies.attach import Child, attach, detach


@dataclass(frozen=True)
class Edit(ABC):
    """One change to a tower: how many values it trains and by whose rule."""

    path: str  # of the parameter (Open) or of the module (the others)
    count: int
    rule: str
    why: str
    lr: float

    @property
    @abstractmethod
    def claim(self) -> str:
        """What the edit wants for itself: a parameter, or the name of a new child."""

    @abstractmethod
    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        """Make the change and return the parameters that are trained for it."""

    @abstractmethod
    def switch(self, body: nn.Module, on: bool) -> None:
        """Let what was added do its work, or nothing; changed weights stay as they are."""

    @abstractmethod
    def fold(self, body: nn.Module) -> None:
        """Work what was added into the weights it adds to, and take it away."""

    @abstractmethod
    def rescale(self, body: nn.Module, factor: float) -> None:
        """Multiply what was added by factor; changed weights stay as they are."""

    def check_scalable(self, factor: float) -> None:  # noqa: B027 (most can be)
        """Raise ValueError where what was added works whole or not at all."""


@dataclass(frozen=True)
class Open(Edit):
    """Let an existing parameter train."""

    @property
    def claim(self) -> str:
        return self.path

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        parameter = body.get_parameter(self.path)
        parameter.requires_grad_(True)
        return [parameter]

    def switch(self, body: nn.Module, on: bool) -> None:
        pass

    def fold(self, body: nn.Module) -> None:
        pass

    def rescale(self, body: nn.Module, factor: float) -> None:
        pass


@dataclass(frozen=True)
class Attach(Edit):
    """Register a child module and run it by a forward hook: on the module's input or its output."""

    name: str
    make: Callable[[], Child]
    when: str  # "input": x -> child(x); "output": y -> child(x, y); "block": y -> child(y, attention mask)
    adds_to: str = ""  # the module's own tensor to whose product the child adds, if it does

    @property
    def claim(self) -> str:
        return f"{self.path}.{self.adds_to or self.name}".lstrip(".")

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        child = _made(self)
        # what belongs to the module's own product comes before what works on it
        attach(body.get_submodule(self.path), self.name, child, self.when, first=bool(self.adds_to))
        return child.parameters()

    def child(self, body: nn.Module) -> Child:
        """Return the child where it hangs."""
        child = getattr(body.get_submodule(self.path), self.name)
        assert isinstance(child, Child)
        return child

    def switch(self, body: nn.Module, on: bool) -> None:
        self.child(body).off = not on

    @torch.no_grad()
    def fold(self, body: nn.Module) -> None:
        module = body.get_submodule(self.path)
        weight = getattr(module, self.adds_to)
        weight.copy_(_in_fp32(self.child(body), weight))
        detach(module, self.name)

    def rescale(self, body: nn.Module, factor: float) -> None:
        self.child(body).rescale(factor)


@dataclass(frozen=True)
class Reparametrize(Edit):
    """Replace a weight that is read functionally by a function of itself: W -> child(W)."""

    name: str
    tensor: str
    make: Callable[[], Child]

    @property
    def claim(self) -> str:
        return f"{self.path}.{self.tensor}".lstrip(".")

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        child = _made(self)
        reparametrize(body.get_submodule(self.path), self.tensor, child)
        return child.parameters()

    def child(self, body: nn.Module) -> Child:
        """Return the child where it stands."""
        children: Any = parametrizations(body.get_submodule(self.path))[self.tensor]
        return next(child for child in children if child.name == self.name)

    def switch(self, body: nn.Module, on: bool) -> None:
        self.child(body).off = not on

    @torch.no_grad()
    def fold(self, body: nn.Module) -> None:
        module = body.get_submodule(self.path)
        if not parametrize.is_parametrized(module, self.tensor):
            return  # folded together with another slice of the same weight
        children: Any = parametrizations(module)[self.tensor]
        for child in children:
            children.original.copy_(_in_fp32(child, children.original))
        restore(module, self.tensor)

    def rescale(self, body: nn.Module, factor: float) -> None:
        self.child(body).rescale(factor)


def parametrizations(module: nn.Module) -> nn.ModuleDict:
    """Return the parametrized tensors of a module."""
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return found


def reparametrize(module: nn.Module, tensor: str, child: Child) -> None:
    """Make a parameter a function of itself: child(parameter)."""
    place = [*module._parameters, tensor].index(tensor)
    parametrize.register_parametrization(module, tensor, child)
    children: Any = parametrizations(module)[tensor]
    if len(children) == 1:
        children.place = place  # among the module's own parameters, to come back to


def restore(module: nn.Module, tensor: str) -> None:
    """Make a parametrized tensor a plain parameter again, at its old place, with the value of its original."""
    children: Any = parametrizations(module)[tensor]
    # this brings back the class of the module too, but puts the parameter behind its siblings
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    order = list(module._parameters)
    order.insert(children.place, order.pop())
    for name in order:
        module._parameters[name] = module._parameters.pop(name)


def _made(edit: Attach | Reparametrize) -> Child:
    child = edit.make()
    child.name = edit.name
    assert sum(p.numel() for p in child.parameters()) == edit.count, f"{edit.path}: the plan miscounts {edit.name}"
    return child


def _in_fp32(child: Child, weight: Tensor) -> Tensor:
    """Fold in fp32 or wider, whatever the model's own type and autocast; the child is taken away right after."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        return child.to(wide).fold(weight.to(wide)).to(weight.dtype)
