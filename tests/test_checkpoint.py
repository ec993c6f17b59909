"""A checkpoint holds the trained tensors and everything needed to notice that something else was built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lilt
from lilt import DualEncoder, checkpoint

POLICIES = ["layernorm", "lora(r=2)", "lilt", "frozen"]


@pytest.fixture
def pair(tiny_vision: str, tiny_text: str) -> dict[str, Any]:
    return {"vision": tiny_vision, "text": tiny_text, "projection": "linear(dim=16)"}


def shaken(**options: Any) -> DualEncoder:
    """A model whose trained tensors are no longer those of step 0."""
    model = DualEncoder.build(**options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.core.trained().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_saved_is_what_is_loaded(pair: dict[str, Any], pictures: Path, tmp_path: Path, policy: str) -> None:
    model = shaken(**pair, policy=policy)
    again = lilt.load(model.save(tmp_path / "x"))
    inputs: dict[str, Any] = {"images": sorted(pictures.glob("*.png")), "texts": ["a red picture", "paint"]}
    fresh = DualEncoder.build(**pair, policy=policy).embed(**inputs)
    for side, rows in model.embed(**inputs).items():
        assert torch.equal(rows, again.embed(**inputs)[side])
        assert not torch.equal(rows, fresh[side])
    assert again.config == model.config
    assert not again.training


@pytest.mark.parametrize("policy", POLICIES)
def test_only_trained_tensors_are_in_the_file(pair: dict[str, Any], tmp_path: Path, policy: str) -> None:
    model = DualEncoder.build(**pair, policy=policy)
    tensors = load_file(model.save(tmp_path / "x") / "adapter.safetensors")
    assert set(tensors) == set(model.core.trained())
    assert {"scale.log", "projection.vision.weight", "projection.text.bias"} <= set(tensors)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["README.md", "adapter.safetensors", "lilt.json"]


def test_the_contract_says_how_to_build_it_again(pair: dict[str, Any], tmp_path: Path) -> None:
    model = DualEncoder.build(**pair, policy="layernorm", text_policy="frozen", eval_tokens=9)
    folder = model.save(tmp_path / "x", metrics={"test/mean_recall": 41.25})
    contract = json.loads((folder / "lilt.json").read_text())
    assert contract["model"]["vision"] == pair["vision"]
    assert contract["model"]["text_policy"] == "frozen"
    assert contract["model"]["eval_tokens"] == 9
    assert "epochs" not in contract["model"]
    vision, text = contract["towers"]["vision"], contract["towers"]["text"]
    assert (vision["dim"], len(vision["fingerprint"]), vision["input"]["image_px"]) == (32, 64, 32)
    assert text["input"]["context_tokens"] == 16
    assert text["input"]["special_tokens"]["cls_token"] == "[CLS]"
    assert vision["fingerprint"] != text["fingerprint"]
    trained = model.core.trained()
    assert contract["tensors"] == {name: list(p.shape) for name, p in sorted(trained.items())}
    assert contract["trained"] == sum(p.numel() for p in trained.values())
    assert contract["total"] == sum(p.numel() for p in model.core.parameters())
    assert {"lilt", "torch", "timm", "transformers", "python"} <= contract["versions"].keys()
    assert contract["metrics"] == {"test/mean_recall": 41.25}


def test_the_card_speaks_to_people(pair: dict[str, Any], tmp_path: Path) -> None:
    model = DualEncoder.build(**pair, text_policy="lora(r=2)")
    card = (model.save(tmp_path / "x", metrics={"test/mean_recall": 41.25}) / "README.md").read_text()
    trained = sum(p.numel() for p in model.core.trained().values())
    for part in (pair["vision"], pair["text"], f"{trained:,} trained", "`layernorm` (vision)", "`lora(r=2)` (text)"):
        assert part in card
    assert "| test/mean_recall | 41.25 |" in card
    assert card.startswith("---\nlibrary_name: lilt\n")


@pytest.mark.parametrize("side", ["vision", "text"])
def test_other_base_weights_are_refused_by_fingerprint(
    pair: dict[str, Any], tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, base = str(pair[side]).partition(":")
    shutil.copytree(base, tmp_path / "base")
    options = pair | {side: f"{kind}:{tmp_path / 'base'}"}
    folder = DualEncoder.build(**options).save(tmp_path / "x")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = next(k for k, t in tensors.items() if t.ndim > 1 and "head" not in k and "pooler" not in k)
    tensors[name][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    then = json.loads((folder / "lilt.json").read_text())["towers"][side]["fingerprint"][:12]
    message = (
        rf"the {side} tower '.*' has other base weights .*\(fingerprint \w{{12}}, expected {then}\); use the weights"
    )
    with pytest.raises(ValueError, match=message):
        lilt.load(folder)


def test_another_input_is_refused(pair: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(pair["text"].removeprefix("hf:"), tmp_path / "base")
    folder = DualEncoder.build(**(pair | {"text": f"hf:{tmp_path / 'base'}"})).save(tmp_path / "x")
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 8}))
    with pytest.raises(ValueError, match=r"the text tower .* has input .*8.*, the checkpoint .*16.*: build the tower"):
        lilt.load(folder)


def test_another_resolution_is_not_taken_for_other_weights(pair: dict[str, Any], tmp_path: Path) -> None:
    folder = DualEncoder.build(**pair).save(tmp_path / "x")
    with pytest.raises(ValueError, match=r"the vision tower .* has input .*'image_px': 64.*: build the tower with"):
        lilt.load(folder, image_px=64)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the adapter and sign it, as somebody's own tool would."""
    save_file(tensors, folder / "adapter.safetensors")
    contract = json.loads((folder / "lilt.json").read_text())
    contract["adapter_sha256"] = checkpoint._sha256(folder / "adapter.safetensors")
    (folder / "lilt.json").write_text(json.dumps(contract))


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_a_missing_surplus_or_misshapen_tensor_is_named(pair: dict[str, Any], tmp_path: Path, change: str) -> None:
    folder = DualEncoder.build(**pair).save(tmp_path / "x")
    tensors = load_file(folder / "adapter.safetensors")
    if change == "surplus":
        tensors["vision.body.extra"] = torch.zeros(1)
    elif change == "missing":
        del tensors["projection.text.bias"]
    else:
        tensors["projection.text.bias"] = torch.zeros(17)
    rewrite(folder, tensors)
    messages = {
        "missing": r"x misses 1 tensors \(first: 'projection.text.bias'\)",
        "surplus": r"x has surplus 1 tensors \(first: 'vision.body.extra'\)",
        "shape": r"x: 'projection.text.bias' has shape \(17,\), the model \(16,\)",
    }
    with pytest.raises(ValueError, match=messages[change]):
        lilt.load(folder)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_torn_adapter_is_an_error(pair: dict[str, Any], tmp_path: Path, damage: str) -> None:
    file = DualEncoder.build(**pair).save(tmp_path / "x") / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content if damage == "flip" else content[:-40])
    with pytest.raises(ValueError, match=r"adapter.safetensors is not the file that lilt.json was written with .*torn"):
        lilt.load(tmp_path / "x")


@pytest.mark.parametrize("content", ["{", "{}", '{"format": 99}', "[]"])
def test_a_broken_or_newer_contract_is_an_error(pair: dict[str, Any], tmp_path: Path, content: str) -> None:
    folder = DualEncoder.build(**pair).save(tmp_path / "x")
    (folder / "lilt.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{folder}.*(format 99, this lilt reads up to 1; upgrade|is not a contract)"):
        lilt.load(folder)


@pytest.mark.parametrize("name", ["adapter.safetensors", "lilt.json", "."])
def test_a_folder_without_a_checkpoint_is_an_error(pair: dict[str, Any], tmp_path: Path, name: str) -> None:
    folder = DualEncoder.build(**pair).save(tmp_path / "x")
    shutil.rmtree(folder) if name == "." else (folder / name).unlink()
    with pytest.raises(ValueError, match=r"x holds no lilt checkpoint; expected lilt.json and adapter.safetensors"):
        lilt.load(folder)


def test_nothing_is_overwritten_unasked(pair: dict[str, Any], tmp_path: Path) -> None:
    one, other = DualEncoder.build(**pair), shaken(**pair)
    folder = one.save(tmp_path / "x")
    before = (folder / "adapter.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a checkpoint; nothing was written: pass overwrite=True or ano"):
        other.save(folder)
    assert (folder / "adapter.safetensors").read_bytes() == before
    other.save(folder, overwrite=True)
    assert (folder / "adapter.safetensors").read_bytes() != before
    assert lilt.load(folder)


@pytest.mark.parametrize("policy", ["layernorm", "full", "lora(r=2)"])
def test_a_folder_in_half_precision_gives_masters_in_full(pair: dict[str, Any], tmp_path: Path, policy: str) -> None:
    base = tmp_path / "half"
    shutil.copytree(pair["text"].removeprefix("hf:"), base)
    tensors = load_file(base / "model.safetensors")
    save_file({k: t.half() for k, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = DualEncoder.build(**(pair | {"text": f"hf:{base}", "policy": policy}))
    assert {p.dtype for p in model.core.parameters()} == {torch.float32}
    assert {t.dtype for t in load_file(model.save(tmp_path / "x") / "adapter.safetensors").values()} == {torch.float32}
    assert lilt.load(tmp_path / "x")
