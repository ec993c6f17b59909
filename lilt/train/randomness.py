"""The generators that dropout draws from: taken down, and put back for the same draws again."""

from __future__ import annotations

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]  # of the processor, and of the accelerator if there is one


def random_state(device: torch.device) -> RandomState:
    """Return the states of the generators that dropout draws from."""
    return torch.get_rng_state(), None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Put them back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1])
