import runpy
import sys
from pathlib import Path

import pytest
import timm
from transformers import AutoModel, AutoTokenizer

from lilt import demo

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_demo.py"


def pretrain(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> None:
    # a pool of 400 scenes is enough to meet every word
    size = ["--vision-steps=2", "--text-steps=2", "--vision-batch-size=4", "--text-batch-size=4", "--pool=400"]
    places = ["--vision", str(folder / "vision"), "--text", str(folder / "text")]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *size, *places, *more])
    runpy.run_path(str(RECIPE), run_name="__main__")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_recipe_makes_the_folders_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(monkeypatch, tmp_path)
    vision = timm.create_model(f"local-dir:{tmp_path / 'vision'}", pretrained=True, num_classes=0)
    shipped = timm.create_model(f"local-dir:{demo.VISION}", pretrained=True, num_classes=0)
    assert {n: p.shape for n, p in vision.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    text, own = (AutoModel.from_pretrained(folder) for folder in (tmp_path / "text", demo.TEXT))
    assert {n: p.shape for n, p in text.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path / "text", demo.TEXT)]
    assert vocabularies[0] == vocabularies[1]


def test_the_seed_decides_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        pretrain(monkeypatch, tmp_path / name, "--only", "vision", "--seed", seed)
    one, same, other = (weights(tmp_path / name / "vision") for name in ("one", "same", "other"))
    assert one == same != other


def test_a_tower_is_not_overwritten_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    with pytest.raises(SystemExit, match="2"):
        pretrain(monkeypatch, tmp_path)
    assert "give --overwrite, or another folder" in capsys.readouterr().err
    assert not (tmp_path / "vision").exists()
    pretrain(monkeypatch, tmp_path, "--only", "text", "--overwrite")
    assert weights(tmp_path / "text")
