"""Every parameter is decided, and the report says by which rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import lilt
from lilt.policies import summary
from lilt.towers import build_tower
from tests.policies.conformance import tuned
from tests.towers.families import CONTRACT, Patches


def test_the_report_covers_every_parameter_of_both_towers(tiny_vision: str, tiny_text: str) -> None:
    model = lilt.DualEncoder.build(tiny_vision, tiny_text, "lora(r=2)+layernorm(blocks=last:1)")
    rows = model.report()
    wanted = {
        f"{side}.{name}": parameter
        for side, tower in (("vision", model.core.vision), ("text", model.core.text))
        for name, parameter in tower.body.named_parameters()
    }
    assert {row.name for row in rows} == set(wanted)
    for row in rows:
        assert (row.values, row.trained) == (wanted[row.name].numel(), wanted[row.name].requires_grad)
        assert row.trained == (row.rule in ("lora", "layernorm"))


def test_the_summary_counts_trained_values_by_rule(tiny_vision: str, tiny_text: str) -> None:
    rows = lilt.DualEncoder.build(tiny_vision, tiny_text, "lit").report()
    assert summary(rows) == {("full", "parameters"): sum(row.values for row in rows if row.name.startswith("text."))}


class Watched(nn.Module):
    """An encoder of torch's own layers that counts how often all its parameters are gone through."""

    def __init__(self, depth: int):
        super().__init__()
        self.embed = Patches()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 48, batch_first=True) for _ in range(depth)])
        self.walks = 0

    def forward(self, x: Any) -> Any:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self.walks += 1
        return super().named_parameters(*args, **kwargs)


@pytest.mark.parametrize("spec", ["full", "layernorm+lora(targets=all)", "bitfit+adapter", "ia3"])
def test_applying_goes_through_the_tower_as_often_however_much_it_trains(spec: str) -> None:
    walks = []
    for depth in (1, 4):
        tower = build_tower(Watched(depth), "vision", CONTRACT)
        before = tower.body.walks
        assert len(tuned(spec, tower, alive=False).fates or {}) >= 2 * depth
        walks.append(tower.body.walks - before)
    assert walks[0] == walks[1]
