"""Masks, position biases and rotations with room for new tokens: who may read them, and that nobody else is moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lilt.policies.lengthen import Gap, lengthen

FAR = torch.finfo(torch.float32).min
REAL = torch.tensor([[True, True, True, True], [True, True, False, False]])
WIDE = torch.cat([torch.ones(2, 2).bool(), REAL], dim=1)  # two new tokens in front
BOTH = WIDE[:, None, None, :].expand(2, 1, 6, 6)
CAUSAL, CAUSAL_WIDE = torch.ones(4, 4).tril().bool(), torch.ones(6, 6).tril().bool()


def added(keep: Tensor, far: float = FAR) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, far)


def after(given: Tensor, expected: Tensor, name: str = "attention_mask") -> tuple[str, Tensor, Tensor]:
    return name, given, expected


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        after(REAL.long(), WIDE.long()),
        after(REAL[:, None, None, :], WIDE[:, None, None, :]),
        after(REAL[:, None, None, :].expand(2, 1, 4, 4), BOTH),
        after(REAL[:, None, None, :] & CAUSAL, BOTH & CAUSAL_WIDE),
        after(added(REAL[:, None, None, :].expand(2, 1, 4, 4)), added(BOTH)),
        after(added(REAL[:, None, None, :] & CAUSAL), added(BOTH & CAUSAL_WIDE)),
        after(~REAL, ~WIDE, "src_key_padding_mask"),
        after(added(REAL), added(WIDE), "src_key_padding_mask"),
        after(~CAUSAL, ~CAUSAL_WIDE, "src_mask"),
        after(added(CAUSAL).repeat(6, 1, 1), added(CAUSAL_WIDE).repeat(6, 1, 1), "attn_mask"),
        after(torch.ones(1, 3, 4, 4), nn.functional.pad(torch.ones(1, 3, 4, 4), (2, 0, 2, 0)), "position_bias"),
        after(torch.ones(1, 3, 6, 6), torch.ones(1, 3, 6, 6), "position_bias"),
        after(torch.arange(4)[None], torch.arange(4)[None], "position_ids"),
    ],
)  # fmt: skip
def test_what_a_block_is_called_with_has_room_for_them(name: str, given: Tensor, expected: Tensor) -> None:
    assert torch.equal(lengthen({name: given}, Gap(0, 2, 4))[name], expected)


def test_a_window_of_local_attention_does_not_hide_them() -> None:
    near = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    found = lengthen({"attention_mask": near[None, None]}, Gap(0, 2, 4))["attention_mask"][0, 0]
    assert found[:2].all() and found[:, :2].all()
    assert torch.equal(found[2:, 2:], near)


def test_rotations_are_none_for_them_and_keep_their_scale() -> None:
    angle = torch.randn(1, 4, 6)
    cos, sin = lengthen({"position_embeddings": (2 * angle.cos(), 2 * angle.sin())}, Gap(0, 2, 4))[
        "position_embeddings"
    ]
    assert torch.equal(cos[:, 2:], 2 * angle.cos()) and torch.equal(sin[:, 2:], 2 * angle.sin())
    torch.testing.assert_close(cos[:, :2], torch.full((1, 2, 6), 2.0))
    assert not sin[:, :2].any()
