"""The towers of the package are ordinary towers under a short name."""

from __future__ import annotations

import pytest

from lilt import demo
from lilt.towers import build_tower
from tests.towers.families import batch


@pytest.mark.parametrize(("side", "folder"), [("vision", demo.VISION), ("text", demo.TEXT)])
def test_demo_stands_for_a_folder(side: str, folder: object) -> None:
    if not demo.VISION.is_dir() or not demo.TEXT.is_dir():
        pytest.skip("the demo towers are not made yet")
    tower = build_tower("demo", side)
    source = "timm" if side == "vision" else "hf"
    assert tower.spec == "demo"
    assert tower.fingerprint == build_tower(f"{source}:{folder}", side).fingerprint
    assert len(build_tower("demo?layers=1", side).blocks) == 1
    assert tower(batch(tower)).shape == (3, tower.dim)
