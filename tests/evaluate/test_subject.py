"""What was computed of a model in one state is not taken for another state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lilt import DualEncoder
from lilt.evaluate import Setting, Subject


@pytest.mark.parametrize("side", ["vision", "text"])
def test_features_belong_to_one_state(
    tuned: DualEncoder, pictures: Path, tiny_vision: str, tiny_text: str, side: str
) -> None:
    items = (
        [str(f) for f in sorted(pictures.glob("*.png"))[:5]] if side == "vision" else ["a red boat", "blue", "paper"]
    )
    base = Subject(DualEncoder.build(tiny_vision, tiny_text, "frozen"), Setting(batch_size=2))
    subject = Subject(tuned, Setting(batch_size=2))
    before = base.features(side, "x", items).rows
    after = subject.features(side, "x", items).rows
    assert (before - after).abs().max() > 1e-2
    with subject.at_base() as there:
        torch.testing.assert_close(there.features(side, "x", items).rows, before, rtol=0, atol=1e-5)
    half = subject.between(0.5).features(side, "x", items).rows
    assert min((half - before).abs().max(), (half - after).abs().max()) > 1e-3
    assert subject.features(side, "x", items).rows is after  # computed once
    assert len(subject.features(side, "x", items[:2]).rows) == 2
    torch.testing.assert_close(Subject(tuned).features(side, "x", items).rows, after, rtol=0, atol=1e-5)


def test_the_mode_is_restored(tuned: DualEncoder, pictures: Path) -> None:
    tuned.train()
    try:
        Subject(tuned).features("vision", "x", [str(pictures / "red0.png")])
        assert tuned.core.training
    finally:
        tuned.eval()
