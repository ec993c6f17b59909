"""Weights and factories from files: safetensors first, pickles only as plain tensors, random weights reproducible."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import nn

from lilt.towers.spec import TowerSpec


@contextlib.contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Build under one seed and leave the global generator alone: a tower with random weights can be built again."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def weights_file(path: str) -> str:
    """Return the path of a weights file that exists and has a known ending."""
    if not Path(path).is_file():
        raise ValueError(
            f"weights={path}: no such file; expected a .safetensors, .pth, .pt or .bin file; check the path"
        )
    if Path(path).suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise ValueError(f"weights={path}: unknown ending; expected .safetensors, .pth, .pt or .bin; convert the file")
    return path


def load_weights(body: nn.Module, path: str) -> None:
    """Load a file of weights; a common prefix or wrapper key is unpacked, a missing or surplus tensor is an error."""
    file = weights_file(path)
    if file.endswith(".safetensors"):
        state: dict[str, Any] = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for wrapper in ("state_dict", "model"):
            if isinstance(state.get(wrapper), dict):
                state = state[wrapper]
    own = body.state_dict()
    prefix = next(
        (p for p in ("", "module.", "model.", f"{_base_prefix(body)}.") if all(p + k in state for k in own)), ""
    )
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing = sorted(set(own) - set(state))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or wrong:
        name = (missing + wrong)[0]
        raise ValueError(
            f"weights={path} does not fit {type(body).__name__}: {len(missing)} tensors missing, {len(wrong)} of "
            f"another shape (first: {name!r}); give the file of the same architecture"
        )
    body.load_state_dict({k: state[k] for k in own})


def _base_prefix(body: nn.Module) -> str:
    return str(getattr(body, "base_model_prefix", "") or "model")


def open_clip_model(spec: TowerSpec) -> Any:
    """Build `ARCH@TAG` (or a `local-dir:`/`hf-hub:` name) as an open_clip model with separate .visual and .text."""
    arch, _, tag = spec.name.partition("@")
    name = f"local-dir:{arch}" if Path(arch).is_dir() else arch
    tag = weights_file(spec.weights) if spec.weights else tag
    try:
        with fixed_seed():
            return open_clip.create_model(
                name,
                pretrained=(tag or None) if spec.pretrained else None,
                load_weights=spec.pretrained,
                pretrained_text=False,
                force_custom_text=True,
                force_image_size=spec.image_px,
            )
    except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(
            f"open_clip could not build {spec.name!r}: {error}. Expected ARCH@TAG of open_clip.list_pretrained(), "
            "or a folder saved by open_clip"
        ) from error


def py_factory(spec: TowerSpec) -> tuple[nn.Module, Any]:
    """Call `package.module:function`; it returns a module, or a module and its preprocess or tokenizer."""
    spec.refuse_extra()
    where, colon, function = spec.name.rpartition(":")
    if not colon:
        raise ValueError(f"py:{spec.name} names no function; expected py:package.module:function")
    try:
        factory = getattr(importlib.import_module(where), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"py:{spec.name}: {error}; expected an importable package.module and a function in it; "
            "run from its folder or install the package"
        ) from error
    with fixed_seed():
        made = factory()
    module, contract = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"py:{spec.name} returned {type(module).__name__}; expected nn.Module or (nn.Module, preprocess)"
        )
    return module, contract
