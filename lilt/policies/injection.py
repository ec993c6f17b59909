"""What the peft library puts into a tower: rehearsed on a copy without weights, carried out module by module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from lilt.policies.edits import Edit

# tensors in which an update is linear; the first one that a layer has takes a factor on the whole
_LINEAR = ("lora_B", "lora_embedding_B", "hada_w1_a", "lokr_w1", "lokr_w1_a", "vera_lambda_b")


@dataclass(frozen=True)
class Wrapped:
    """A module that peft would wrap: its new tensors, and its own, each by its name in the wrapper."""

    path: str
    layer: str  # the class of the wrapper
    fresh: dict[str, int]  # how many values each has
    own: dict[str, str]  # its name in the tower


@dataclass(frozen=True)
class Rehearsal:
    """What an injection would do: wrapped modules, the tower's parameters it opens, tensors it keeps elsewhere."""

    wrapped: tuple[Wrapped, ...]
    opened: dict[str, int]
    outside: tuple[str, ...]


def is_layer(module: nn.Module) -> bool:
    """Say whether a module is one that peft put in the place of another."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def put_in(body: nn.Module, config: PeftConfig) -> nn.Module:
    """Wrap the modules that a configuration names and return peft's tuner; the configuration is spent."""
    assert config.peft_type is not None
    # not by inject_adapter_in_model: it turns VERA away, whose shared matrices are made again from its seed
    tuner: nn.Module = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](body, config, "default")  # type: ignore[index]
    vars(body).pop("peft_config", None)  # would only serve a second adapter
    for layer in layers(body).values():
        layer.train(_wrapped_module(layer).training)  # new layers of an eval tower would drop out
    return tuner


@torch.no_grad()
def take_out(layer: Any) -> nn.Module:
    """Fold a layer of peft into the module it wraps, in fp32 or wider, and return that module."""
    before = [(p.dtype, p.requires_grad) for p in _wrapped_module(layer).parameters()]
    if not any(dtype == torch.float64 for dtype, _ in before):
        layer.float()
    with torch.autocast(next(layer.parameters()).device.type, enabled=False):
        if hasattr(layer, "unload_and_optionally_merge_module"):
            module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            module = layer.get_base_layer()
    # what takes the place of a module's own parameters, as tuned norms do, has their type and is as frozen
    for parameter, (dtype, flag) in zip(module.parameters(), before, strict=True):
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(flag)
    assert isinstance(module, nn.Module)
    return module


def layers(body: nn.Module) -> dict[str, nn.Module]:
    """Return peft's layers by path, without those that stand inside another."""
    found: dict[str, nn.Module] = {}
    last = None
    for path, module in body.named_modules():
        if is_layer(module) and (last is None or not path.startswith(f"{last}.")):
            found[path] = module
            last = path
    return found


def rehearse(body: nn.Module, config: PeftConfig) -> Rehearsal:
    """Inject into a copy on the meta device and see what came of it; the body stays as it is."""
    twin = _without_weights(body)
    names = {id(p): name for name, p in twin.named_parameters()}
    tuner = put_in(twin, config)
    opened = {names[id(p)]: p.numel() for p in twin.parameters() if p.requires_grad and id(p) in names}
    known = set(names)
    wrapped = []
    for path, layer in layers(twin).items():
        inside = dict(layer.named_parameters())
        # a tensor that several layers share belongs to the first
        fresh = {name: p.numel() for name, p in inside.items() if p.requires_grad and id(p) not in known}
        known |= {id(p) for p in inside.values()}
        own = {name: names[id(p)] for name, p in inside.items() if id(p) in names}
        wrapped.append(Wrapped(path, type(layer).__name__, fresh, own))
    outside = tuple(name for name, p in tuner.named_parameters() if p.requires_grad and id(p) not in known | set(names))
    return Rehearsal(tuple(wrapped), opened, outside)


def _without_weights(body: nn.Module) -> nn.Module:
    # deepcopy takes what the memo holds instead of copying it
    memo: dict[int, Any] = {id(b): b.detach().to("meta") for b in body.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in body.parameters()}
    return copy.deepcopy(body, memo)


def _wrapped_module(layer: nn.Module) -> nn.Module:
    module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    assert isinstance(module, nn.Module)
    return module


def stands_for(fresh: str, own: dict[str, str]) -> str:
    """Return which of a module's own parameters a new tensor changes or replaces: the namesake, else the first."""
    tails = {name.rpartition("base_layer.")[2].removeprefix("original_module."): name for name in own}
    namesakes = [tail for tail in tails if fresh.endswith(f".{tail}")]
    return own[tails[max(namesakes, key=len)]] if namesakes else next(iter(own.values()))


@dataclass(frozen=True)
class Inject(Edit):
    """Let train what peft puts around a module for one of its parameters; the first edit injects them all."""

    target: str  # the parameter
    tensors: tuple[str, ...]  # their names in the wrapper
    make: Callable[[], PeftConfig]
    also: tuple[str, ...] = ()  # modules that work with these tensors and have none of their own

    @property
    def claim(self) -> str:
        return self.target

    def carry_out(self, body: nn.Module) -> Iterable[nn.Parameter]:
        if not is_layer(body.get_submodule(self.path)):
            flags = {id(p): p.requires_grad for p in body.parameters()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft has said it already, when this was planned
                put_in(body, self.make())
            for parameter in body.parameters():
                parameter.requires_grad_(flags.get(id(parameter), False))
        inside = dict(body.get_submodule(self.path).named_parameters())
        for name in self.tensors:
            inside[name].data = inside[name].data.float()
            inside[name].requires_grad_(True)
        trained = [inside[name] for name in self.tensors]
        assert sum(p.numel() for p in trained) == self.count, f"{self.path}: the plan miscounts"
        return trained

    def switch(self, body: nn.Module, on: bool) -> None:
        for path in (self.path, *self.also):
            layer: Any = body.get_submodule(path)
            flags = [(p, p.requires_grad) for p in layer.parameters()]
            layer.enable_adapters(on)
            for parameter, flag in flags:  # peft freezes what it switches off
                parameter.requires_grad_(flag)

    def fold(self, body: nn.Module) -> None:
        for path in (self.path, *self.also):
            layer = body.get_submodule(path)
            if not is_layer(layer):
                continue  # folded together with another parameter of the same module
            try:
                module = take_out(layer)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.why} does not merge: peft cannot fold what it put at {path} into the weights; keep it "
                    "beside them, or train another type"
                ) from error
            parent, _, name = path.rpartition(".")
            setattr(body.get_submodule(parent), name, module)

    @torch.no_grad()
    def rescale(self, body: nn.Module, factor: float) -> None:
        inside = dict(body.get_submodule(self.path).named_parameters())
        for name in self._linear():
            inside[name].mul_(factor)

    def check_scalable(self, factor: float) -> None:
        bent = [name for name in self.tensors if name.startswith("lora_magnitude_vector")]
        if factor != 1 and self.tensors and (bent or not self._linear()):
            raise ValueError(
                f"{self.why} at {self.path} cannot be scaled by {factor}: its update is not proportional to one of its "
                "tensors; use it whole, or a LORA without DoRA"
            )

    def _linear(self) -> list[str]:
        return [name for name in self.tensors if name.split(".")[0] in _LINEAR]
