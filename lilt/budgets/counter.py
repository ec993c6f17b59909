"""Counts FLOPs of what runs on the meta device, and runs it fast: each kind of operation is worked out once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and convolutions by the formulas of torch's `FlopCounterMode`.

    A tower is the same block many times over, and torch works out the shape of a result on meta in slow Python. So the
    shapes that an operation gave are kept by the shapes it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._fresh: dict[Any, bool] = {}
        self._known: dict[Any, tuple[int, bool, list[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._fresh:
            self._fresh[func] = _gives_fresh_tensors(func)
        if not self._fresh[func]:
            return func(*args, **kwargs)  # views and changes in place: which storage is whose must stay true
        key = (func, _facts(args), tuple((name, _facts(value)) for name, value in kwargs.items()))
        if key in self._known:
            flops, several, shapes = self._known[key]
            self.flops += flops
            made = tuple(shape and torch.empty_strided(*shape[:2], dtype=shape[2], device="meta") for shape in shapes)
            return made if several else made[0]
        out = func(*args, **kwargs)
        formula = _formula(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        self.flops += flops
        several = isinstance(out, (tuple, list))
        outs = list(out) if several else [out]
        if all(o is None or (isinstance(o, Tensor) and o.is_meta) for o in outs):
            shapes = [None if o is None else (o.shape, o.stride(), o.dtype) for o in outs]
            self._known[key] = (flops, several, shapes)
        return out


def _formula(packet: Any) -> Any:
    if packet is _ATEN.convolution_backward:
        return _convolution_backward
    # torch 2.9 counts these two on accelerators only
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu:
        packet = _ATEN._scaled_dot_product_flash_attention
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        packet = _ATEN._scaled_dot_product_flash_attention_backward
    return flop_registry.get(packet)


def _convolution_backward(*args: Any, out_val: Any) -> int:
    """Each gradient costs what the forward did; torch's formula takes a weight in groups for one over all channels."""
    gradient, x, weight, transposed, wanted = (args[i] for i in (0, 1, 2, 7, 10))
    forward = 2 * (x if transposed else gradient).numel() * weight[0].numel()
    return forward * (bool(wanted[0]) + bool(wanted[1]))


def _gives_fresh_tensors(func: Any) -> bool:
    schema = func._schema
    # the one view that its schema does not own up to
    hidden = func is torch.ops.aten._unsafe_view.default
    return not (schema.is_mutable or hidden or any(value.alias_info for value in schema.returns))


def _facts(value: Any) -> Any:
    """Return what the shape of a result can depend on; a tensor with values is only like itself."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else object()
    if isinstance(value, (list, tuple)):
        return tuple(_facts(item) for item in value)
    return type(value), value
