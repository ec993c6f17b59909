"""A trial run of a tower, which leaves it as it was: what its blocks are given, and what stands in the way of more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lilt.towers.base import Inputs, Tokens, Tower
from lilt.towers.loading import fixed_seed

_TABLE = re.compile(r"rel(ative)?_pos")
LONGEST = 128  # tokens of the longer caption
TROUBLE = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)  # what a network may raise


def pair(tower: Tower) -> Inputs:
    """Return two examples for a tower, captions of different lengths, on its device."""
    device = next(tower.body.parameters()).device
    if tower.side == "vision":
        image = tower.example()
        assert isinstance(image, Tensor)
        noise = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu")
        return noise.to(device, image.dtype)
    tokenizer: Any = tower.contract
    encodings, _ = tokenizer.encode(["a photo of a red boat", "a " * LONGEST], LONGEST)
    return {key: value.to(device) for key, value in tokenizer.pad(encodings).items()}


def watch(tower: Tower, inputs: Inputs) -> tuple[Tokens, list[tuple[int, ...]]]:
    """Run a tower once; return its tokens, and the shapes that its blocks take and give."""
    shapes: list[tuple[int, ...]] = []

    def note(values: tuple) -> None:
        first = next((value for value in values if isinstance(value, Tensor)), None)
        shapes.append(() if first is None else tuple(first.shape))

    def taken(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        note((*args, *kwargs.values()))

    def given(_module: nn.Module, _args: tuple, output: Any) -> None:
        note(output if isinstance(output, tuple) else (output,))

    handles = [block.register_forward_pre_hook(taken, with_kwargs=True) for block in tower.blocks]
    handles += [block.register_forward_hook(given) for block in tower.blocks]
    try:
        with torch.no_grad(), fixed_seed(), _evaluating(tower):
            return tower.read(tower.run(inputs), inputs), shapes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(tower: Tower) -> Iterator[None]:
    modes = [(module, module.training) for module in tower.modules()]
    try:
        # the flag alone: train() and eval() of a module may do more than that
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def position_table(tower: Tower) -> str:
    """Name the table of relative positions that the blocks of a vision tower look their pairs of patches up in."""
    if tower.side == "text":  # one for distances in a caption takes any length
        return ""
    names = (name for name, _ in tower.blocks[0].named_parameters() if _TABLE.search(name))
    return next((f"{tower.anatomy.blocks[0]}.{name}" for name in names), "")


def fixing(tower: Tower, length: int, prefix: int) -> str:
    """Name a tensor in the first block whose shape holds the number of tokens, or of those behind the prefix."""
    block = tower.blocks[0]
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if {length, length - prefix} & set(tensor.shape) - {tower.anatomy.token_width}:
            return f"{tower.anatomy.blocks[0]}.{name} {tuple(tensor.shape)} is made for {length}"
    return ""


def first_line(error: Exception) -> str:
    """Return what an error says, without what follows in a library's longer ones."""
    return str(error).partition("\n")[0] or type(error).__name__
