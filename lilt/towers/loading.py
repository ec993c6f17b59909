"""Weights and factories from files: safetensors first, pickles only as plain tensors, random weights reproducible."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging as hf_logging

from lilt.towers.spec import TowerSpec


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load without transformers' own progress bar, which would cut through ours."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


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


def read_weights(path: str) -> dict[str, Any]:
    """Read a file of tensors; a wrapper key is unpacked, and a pickle of anything else is not opened."""
    file = weights_file(path)
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"weights={path} cannot be read: {str(error).splitlines()[0]} Expected a whole file of plain tensors; "
            "save the state_dict with safetensors"
        ) from error
    wrappers = ("state_dict_ema", "model_ema", "state_dict", "model")
    state = next((state[key] for key in wrappers if isinstance(state.get(key), dict)), state)
    # what DistributedDataParallel puts before each name
    return {k.removeprefix("module."): v for k, v in state.items()}


def load_weights(body: nn.Module, path: str) -> None:
    """Load a file of weights; a common prefix is cut off, surplus tensors are left, a missing one is an error."""
    state = read_weights(path)
    own = body.state_dict()
    base = str(getattr(body, "base_model_prefix", "") or "model")
    prefixes = ("", "model.", f"{base}.", "text_model.", "vision_model.")
    prefix = next((p for p in prefixes if all(p + k in state for k in own)), "")
    fill(body, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, path)


def fill(body: nn.Module, state: dict[str, Any], path: str) -> None:
    """Copy tensors into all parameters and buffers of a network. Raises ValueError if they do not fit."""
    own = body.state_dict()
    missing = sorted(set(own) - set(state))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or wrong:
        name = (wrong + missing)[0]
        raise ValueError(
            f"weights={path} does not fit {type(body).__name__}: {len(missing)} tensors missing, {len(wrong)} of "
            f"another shape (first: {name!r}); give the file of the same architecture"
        )
    body.load_state_dict({k: state[k] for k in own})


def open_clip_model(spec: TowerSpec) -> Any:
    """Build `ARCH@TAG` (or a `local-dir:`/`hf-hub:` name) as an open_clip model with separate .visual and .text."""
    arch, _, tag = spec.name.partition("@")
    name = f"local-dir:{arch}" if Path(arch).is_dir() else arch
    tag = weights_file(spec.weights) if spec.weights else tag
    # a file of weights comes in place of those of a tag, and pretrained=false is about the tag's
    loaded = spec.pretrained or spec.weights is not None
    try:
        with fixed_seed():
            return open_clip.create_model(
                name,
                pretrained=(tag or None) if loaded else None,
                load_weights=loaded,
                pretrained_text=False,
                force_custom_text=True,
                force_image_size=spec.image_px,
                device=torch.get_default_device(),
            )
    except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(
            f"open_clip could not build {spec.name!r}: {error}. Expected ARCH@TAG of open_clip.list_pretrained(), "
            "or a folder saved by open_clip"
        ) from error


def py_factory(spec: TowerSpec) -> tuple[nn.Module, Any, TowerSpec]:
    """Call `package.module:function`; it returns a module, its preprocess or tokenizer, and a role map, or less.

    Returned are module, contract and the spec with that map, where nobody else gave one.
    """
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
    module, contract, roles = (*(made if isinstance(made, tuple) else (made,)), None, None)[:3]
    surplus = isinstance(made, tuple) and len(made) > 3
    if surplus or not isinstance(module, nn.Module) or not isinstance(roles, Mapping | None):
        kinds = ", ".join(type(item).__name__ for item in (made if isinstance(made, tuple) else (made,)))
        raise ValueError(
            f"py:{spec.name} returned {kinds}; expected nn.Module or (nn.Module, preprocess) or (nn.Module, "
            "preprocess, {path pattern: role}); change what the function returns"
        )
    return module, contract, replace(spec, roles=roles if spec.roles is None else spec.roles)
