"""A tuned model and what tasks look at: labelled pictures in folders, in a manifest, and in file names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lilt import DualEncoder
from lilt.evaluate import Setting
from tests.test_merge import shaken

BY_NAME = r"label_from=([a-z]+)\d"


@pytest.fixture(scope="module")
def tuned(tiny_vision: str, tiny_text: str) -> DualEncoder:
    """A model that was trained in full, far from its base."""
    return shaken(vision=tiny_vision, text=tiny_text, policy="full", projection="linear(dim=16)")


@pytest.fixture
def setting(pictures: Path) -> Setting:
    """How to look at 12 train, 6 val and 6 test pictures of six colours."""
    return Setting(str(pictures / "manifest.jsonl"), str(pictures), batch_size=5)


def manifest(file: Path, records: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def grey(file: Path, level: int = 90) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (level, level, 255 - level)).save(file)
    return file
