"""Every shipped recipe runs for two steps on tiny stand-in towers, and its header says what it costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lilt.cli import main

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs_two_steps(
    recipe: Path, tiny_vision: str, tiny_text: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LILT_KIT", str(pictures))
    stand_ins = ["--vision", tiny_vision, "--text", tiny_text, "--data", str(pictures / "manifest.jsonl")]
    small = ["--max_steps", "2", "--batch_size", "4", "--image_px", "32", "--workers", "0"]
    options = ["--config", str(recipe), *stand_ins, *small, "--output", str(tmp_path / "run")]
    recipe_says = yaml.safe_load(recipe.read_text())
    if "teacher" in recipe_says:
        bank = re.sub(r"bank=\d+", "bank=4", recipe_says["distill"])  # two steps of four pairs fill no more
        options += ["--teacher", "timm:test_vit?pretrained=false&image_px=32", "--distill", bank]
    if recipe_says.get("precision") == "fp16":
        options += ["--precision", "bf16"]  # a CPU has no fp16 training
    assert main(["train", *options]) == 0
    contract = json.loads((tmp_path / "run" / "lilt.json").read_text())
    assert contract["model"]["shared"] == recipe_says.get("shared", "none")
    assert contract["model"]["policy"] == recipe_says["policy"]
    assert contract["metrics"]["val/mean_recall"] >= 0
    assert contract["metrics"]["test/num_images"] == 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_opens_with_its_command(recipe: Path) -> None:
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"recipes/train.py --config recipes/{recipe.name}" in line for line in header)
