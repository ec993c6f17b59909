"""The shared projection: two maps, or one for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lilt.model import build_projection, projections


def count(projection: torch.nn.Module) -> int:
    return sum(p.numel() for p in projection.parameters())


def test_linear_is_one_map_per_tower_into_256_dimensions() -> None:
    heads: Any = build_projection("linear", 8, 12)
    v, t = torch.randn(3, 8), torch.randn(3, 12)
    assert torch.equal(heads.project_vision(v), heads.vision(v))
    assert torch.equal(heads.project_text(t), heads.text(t))
    assert heads.project_text(t).shape == (3, 256) and heads.dim == 256
    assert count(heads) == (8 + 1) * 256 + (12 + 1) * 256


@pytest.mark.parametrize(("widths", "bridge"), [((8, 8), 0), ((8, 12), 8 * 12 + 12), ((12, 8), 8 * 12 + 12)])
def test_tied_is_one_map_for_both_behind_a_bridge_from_the_narrower(widths: tuple[int, int], bridge: int) -> None:
    heads: Any = build_projection("linear(dim=5,tied=true)", *widths)
    v, t = torch.randn(3, widths[0]), torch.randn(3, widths[1])
    assert count(heads) == (max(widths) + 1) * 5 + bridge
    torch.testing.assert_close(heads.project_vision(v), heads.shared(heads.vision(v)))
    torch.testing.assert_close(heads.project_text(t), heads.shared(heads.text(t)))
    before = heads.project_vision(v), heads.project_text(t)
    with torch.no_grad():
        heads.shared.bias += 1
    torch.testing.assert_close((heads.project_vision(v), heads.project_text(t)), tuple(x + 1 for x in before))
    if widths[0] == widths[1]:
        torch.testing.assert_close(heads.project_vision(v), heads.project_text(v))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("linaer", r"unknown projection 'linaer'; known: linear\. Did you mean 'linear'\?"),
        ("linear(dims=4)", r"linear has no option 'dims'; it takes: dim, tied\. Did you mean 'dim'\?"),
        ("linear(dim=wide)", "linear: dim=wide is not of type int"),
        ("linear(tied=maybe)", "tied=maybe is not a truth value"),
        ("linear(vision_dim=4)", "linear has no option 'vision_dim'"),
        ("linear(4", r"cannot read .*; expected name or name\(key=value,…\); check the brackets"),
    ],
)
def test_a_misspelt_projection_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_projection(spec, 8, 8)


def test_the_registry_lists_what_there_is() -> None:
    assert projections.names() == ["linear"]
