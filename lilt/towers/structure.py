"""What tells two bodies with the same weights apart: the classes they are made of, and what those were told."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# where a model came from and who saved it changes nothing of what it computes
_SAID_ELSEWHERE = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)


def structure(body: nn.Module) -> str:
    """Return a SHA-256 over the modules of a body, their plain settings, and the buffers that no file holds.

    `fingerprint` is of the weights; an activation, a number of heads or a base of rotary positions is in none of them.
    It is the same in every process. To be taken before any edit. Raises nothing: what is not plain counts as its class.
    """
    digest = hashlib.sha256()
    saved = body.state_dict().keys()
    ours = vars(nn.Module()).keys()
    told: set[int] = set()  # transformers hands one config to every module
    for path, module in body.named_modules():
        digest.update(f"{path} {_name(type(module))}\n".encode())
        for key, value in sorted(vars(module).items()):
            if key not in ours and key not in _SAID_ELSEWHERE and id(value) not in told:
                told |= {id(value)} if isinstance(value, PretrainedConfig) else set()
                digest.update(f"{key}={_describe(value)}\n".encode(errors="surrogateescape"))
    for name, buffer in body.named_buffers():
        if name not in saved:
            digest.update(f"{name} {_describe(buffer)}\n".encode())
    return digest.hexdigest()


def _describe(value: Any) -> str:
    """Return a text of a value without addresses of memory, and without an order that could change."""
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, PretrainedConfig):
        return _describe(value.to_dict())
    if isinstance(value, Mapping):
        return _listed(f"{k}: {_describe(v)}" for k, v in value.items() if k not in _SAID_ELSEWHERE)
    if isinstance(value, (set, frozenset)):
        return _listed(map(_describe, value))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_describe, value)) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        return _name(type(value)) + _listed(f"{f.name}: {_describe(getattr(value, f.name))}" for f in fields(value))
    if isinstance(value, functools.partial):
        return f"{_describe(value.func)}({_describe(value.args)}, {_describe(value.keywords)})"
    return _name(value if isinstance(value, (type, Callable)) else type(value))  # type: ignore[arg-type]


def _listed(items: Any) -> str:
    return "{" + ", ".join(sorted(items)) + "}"


def _tensor(value: Tensor) -> str:
    shape = f"{tuple(value.shape)} {value.dtype}"
    if value.device.type == "meta":
        return shape
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return f"{shape} {hashlib.sha256(data).hexdigest()}"


def _name(value: Any) -> str:
    """Return the name of a class or function; of an object that can be called, that of its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
