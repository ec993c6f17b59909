"""Every parameter is decided, and the report says by which rule."""

from __future__ import annotations

import lilt
from lilt.policies import summary


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
