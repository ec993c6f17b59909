"""Children on a finished module: registered under a name and run by a forward hook."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Child(nn.Module):
    """What a policy adds to a tower. While `off` it does nothing, bit for bit."""

    off = False
    name = ""  # under which it was added

    def fold(self, weight: Tensor) -> Tensor:
        """Return the tensor this child adds to, with its work in it. Only children of mergeable policies can."""
        raise NotImplementedError

    def rescale(self, factor: float) -> None:
        """Multiply what this child adds by factor, in place."""
        raise NotImplementedError


def attach(module: nn.Module, name: str, child: Child, when: str, first: bool = False) -> None:
    """Register child under name and hook it in, as the first to see an output if asked.

    Hooks look the child up, so that a deep copy uses its own.
    """
    assert not hasattr(module, name), f"{name} is already attached"
    module.add_module(name, child)
    if when == "input":
        module.register_forward_pre_hook(_InputHook(name), with_kwargs=True)
    elif when == "around":
        module.register_forward_pre_hook(_BeforeHook(name), with_kwargs=True)
        module.register_forward_hook(_AfterHook(name), with_kwargs=True)
    else:
        hook = _OutputHook(name) if when == "output" else _BlockHook(name)
        # a new block belongs inside what stands around this one, which has made its masks longer
        module.register_forward_hook(hook, with_kwargs=True, prepend=first or when == "block")


def detach(module: nn.Module, name: str) -> None:
    """Take a child and its hook away again."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if getattr(hook, "name", None) == name]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(key, None)
    delattr(module, name)


@dataclass(frozen=True)
class _InputHook:
    name: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        child = getattr(module, self.name)
        if child.off:
            return args, kwargs
        if args and isinstance(args[0], Tensor):
            return (child(args[0]), *args[1:]), kwargs
        key = _first_tensor(kwargs)
        return args, {**kwargs, key: child(kwargs[key])}


@dataclass(frozen=True)
class _BeforeHook:
    name: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        child = getattr(module, self.name)
        return (args, kwargs) if child.off else child.before(module, args, kwargs)


@dataclass(frozen=True)
class _AfterHook:
    name: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        child = getattr(module, self.name)
        return output if child.off else child.after(output)


@dataclass(frozen=True)
class _OutputHook:
    name: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        child = getattr(module, self.name)
        if child.off:
            return output
        given = args[0] if args and isinstance(args[0], Tensor) else kwargs[_first_tensor(kwargs)]
        if isinstance(output, Tensor):
            return child(given, output)
        return (child(given, output[0]), *output[1:])


@dataclass(frozen=True)
class _BlockHook:
    name: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        child = getattr(module, self.name)
        if child.off:
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.ndim != 3:
            raise ValueError(
                f"{self.name} needs tokens (B, L, D) and the block gives {tuple(hidden.shape)}; use adapter"
            )
        # read from the call itself, not from a stored state: a checkpointed block is run again in backward
        changed = child(hidden, attention_mask(module, args, kwargs, hidden.shape[1]))
        return changed if isinstance(output, Tensor) else (changed, *output[1:])


TORCH_MASKS = ("attn_mask", "src_mask")  # (L, L), in torch's own layers True is hidden


def attention_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any], length: int) -> Tensor | None:
    """Find the mask a block was called with, as scaled_dot_product_attention takes it (bool: True is kept)."""
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    masks = {k: v for k, v in given.items() if "mask" in k and isinstance(v, Tensor) and v.shape[-1] == length}
    for key, value in sorted(masks.items(), key=lambda item: "padding" not in item[0]):
        if value.ndim == 4:
            # over all queries: a decoder hides the future too, but passes no mask at all when nothing is padded
            return value.amax(-2, keepdim=True) if value.is_floating_point() else value.any(-2, keepdim=True)
        if value.ndim == 2 and "padding" in key:
            return ~value.bool()[:, None, None, :]
        if value.ndim == 2 and value.shape[0] == length and (value.is_floating_point() or key in TORCH_MASKS):
            return value if value.is_floating_point() else ~value.bool()
        if value.ndim == 2:
            return value.bool()[:, None, None, :]
    return None


def _first_tensor(kwargs: dict[str, Any]) -> str:
    return next(key for key, value in kwargs.items() if isinstance(value, Tensor))
