"""What is wrong with a tower spec is said in three parts: what came, what was expected, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lilt.towers import TowerSpec, build_tower, expand
from tests.towers.families import CONTRACT, open_clip_arch

TINY = "timm:vit_tiny_patch16_224?pretrained=false&image_px=32&patch_size=8&embed_dim=32&depth=2&num_heads=2"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tim:vit_tiny", r"unknown vision tower 'tim:vit_tiny'; expected one of .*timm:….* Did you mean 'timm'\?"),
        ("dem", r"unknown vision tower 'dem'.*Did you mean 'demo'\?"),
        ("timm:vit_tinny?pretrained=false", "timm could not build 'vit_tinny'.*Expected a name of timm.list_models"),
        (f"{TINY}&qkv_byas=true", "timm could not build.*qkv_byas.*options that its model takes"),
        (f"{TINY}&layers=3", "layers=3: 'timm:vit_tiny_patch16_224' has 2 blocks; give 1 to 2"),
        (f"{TINY}&layers=0", "layers=0: .* has 2 blocks; give 1 to 2"),
        (f"{TINY}&layers=two", "layers=two is not of type int"),
        (f"{TINY}&pool=avg", "unknown pool 'avg'; known: own, cls, mean"),
        (f"{TINY}&pool=tokens", r"unknown pool 'tokens'.*Did you mean 'token'\?"),
        (f"{TINY}&pretrained=perhaps", "pretrained=perhaps is not a truth value; write true or false"),
        ("timm:test_resnet?pretrained=false&pool=cls", "pool=cls needs a class token and this tower has none; use"),
        ("hf:no/such/folder?layer=2", r"has no option 'layer'; it takes: weights, layers.*Did you mean 'layers'\?"),
        ("open_clip:NoSuchArch", "open_clip could not build 'NoSuchArch'.*Expected ARCH@TAG"),
        (f"open_clip:{open_clip_arch()}?pretrained=false&pools=cls", r"has no option 'pools'.*Did you mean 'pool'\?"),
        ("py:os.path", "py:os.path names no function; expected py:package.module:function"),
        ("py:no_such_package:make", "No module named 'no_such_package'; expected an importable package.module"),
        (
            "timm:x?weights=$NO_SUCH_VARIABLE/x.pth",
            "the environment variable NO_SUCH_VARIABLE, which is not set; set",
        ),
    ],
)
def test_a_wrong_spec_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tower(spec, "vision")


@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_folder_that_is_no_model_is_named(side: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"transformers could not load the {side} tower '{tmp_path}'.* Expected"):
        build_tower(f"hf:{tmp_path}", side)


def test_weights_that_are_missing_or_of_unknown_kind_are_named(tmp_path: Path, bert: str) -> None:
    with pytest.raises(ValueError, match=r"weights=no\.pth: no such file; expected a \.safetensors"):
        build_tower(f"{TINY}&weights=no.pth", "vision")
    (tmp_path / "w.ckpt").write_bytes(b"")
    for spec in (TINY, bert + "?"):
        with pytest.raises(ValueError, match=r"unknown ending; expected \.safetensors, \.pth"):
            build_tower(f"{spec}&weights={tmp_path / 'w.ckpt'}", "vision" if spec == TINY else "text")


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_an_error(change: str, tmp_path: Path, bert: str) -> None:
    for spec, side in ((TINY, "vision"), (bert + "?", "text")):
        state = build_tower(spec, side).body.state_dict()
        name = next(name for name in state if name.endswith("mlp.fc2.bias") or name.endswith("0.output.dense.bias"))
        if change == "missing":
            del state[name]
        else:
            state[name] = torch.zeros(7)
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            build_tower(f"{spec}&weights={tmp_path / 'w.pth'}", side)


def test_a_pickle_of_objects_is_not_opened(tmp_path: Path, bert: str) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"weights=.*w\.pth cannot be read.*Expected a whole file of plain"):
        build_tower(f"{bert}?weights={tmp_path / 'w.pth'}", "text")


def test_modules_without_their_input_contract_are_an_error() -> None:
    with pytest.raises(ValueError, match="Linear came without a preprocess; a vision tower needs its own: pass"):
        build_tower(nn.Linear(2, 2), "vision")
    with pytest.raises(ValueError, match="Linear came without a tokenizer; a text tower needs its own: pass"):
        build_tower(nn.Linear(2, 2), "text")


def test_a_module_that_does_not_run_on_its_contract_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'module:Linear' does not run on an example: .*check pool=own, layers and"):
        build_tower(nn.Linear(7, 2), "vision", CONTRACT)


def test_home_and_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", "/data")
    assert expand("${WEIGHTS}/a.pth") == expand("$WEIGHTS/a.pth") == "/data/a.pth"
    assert expand("~/a") == str(Path.home() / "a")


def test_a_spec_is_parsed_with_its_options() -> None:
    spec = TowerSpec.parse("timm:name?layers=6&pool=cls+mean&pretrained=false&window=7", image_px=64)
    assert spec == TowerSpec("timm", "name", None, 6, "cls+mean", False, 64, {"window": "7"})
    assert TowerSpec.parse("timm:name?image_px=32", image_px=64).image_px == 32
    assert TowerSpec.parse("py:package.module:make").name == "package.module:make"
    assert TowerSpec.parse("open_clip:ViT-B-32@openai").name == "ViT-B-32@openai"
