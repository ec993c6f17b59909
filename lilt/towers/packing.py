"""Torch's own encoders, kept from packing padded captions into nested tensors."""

from __future__ import annotations

from torch import nn


def keep_padding(body: nn.Module) -> None:
    """Make every nn.TransformerEncoder in a network run on the tensors (B, L, D) it is given, padding and all.

    In eval mode and without gradients it would pack them, and then what hangs in its layers fails: nested tensors have
    no shape. Outputs of real tokens stay the same, those of padding are what they are in training instead of zeros.
    """
    for module in body.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
