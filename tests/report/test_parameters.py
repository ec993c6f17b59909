"""Where trained values are, of every kind of policy."""

from __future__ import annotations

from typing import Any

import pytest

from lilt import DualEncoder
from lilt.report.parameters import ADDED, OUTSIDE, count_trained


@pytest.mark.parametrize(
    ("policy", "vision", "text"),
    [
        ("full", {"norm", "attention", "mlp", "embedding"}, {"norm", "attention", "mlp", "embedding"}),
        ("layernorm", {"norm"}, {"norm"}),
        ("lora(r=2)", {"attention"}, {"attention"}),
        ("lora(r=2,targets=mlp)", {"mlp"}, {"mlp"}),
        ("bitfit", {"norm", "attention", "mlp", "embedding"}, {"norm", "attention", "mlp"}),
        ("deep_adapter", {ADDED}, {ADDED}),
        ("lit_mirror", {"norm", "attention", "mlp", "embedding"}, set()),
        ("adapter(reduction=4)+layernorm", None, None),
        ("prompt(n=2)", None, None),
        ("ia3", None, None),
    ],
)
def test_every_trained_value_is_counted_once(
    policy: str, vision: set[str] | None, text: set[str] | None, settings: dict[str, Any]
) -> None:
    core = DualEncoder.build(**settings, policy=policy).core
    counts = count_trained(core)
    for side, expected in (("vision", vision), ("text", text)):
        own = [p.numel() for name, p in core.trained().items() if name.startswith(f"{side}.")]
        assert sum(n for roles in counts[side].values() for n in roles.values()) == sum(own)
        roles = {role for found in counts[side].values() for role in found}
        assert expected is None or roles == expected
        blocks = [place for place in counts[side] if place != OUTSIDE]
        assert blocks in ([], ["block 0", "block 1"])
    assert counts["heads"] == {"projection": {"heads": 2 * (32 * 16 + 16)}, "scale": {"heads": 1}}
