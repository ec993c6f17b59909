"""Every way of naming a tower gives the library's own model and its own features."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from lilt.towers import ImageContract, Tower, TowerSpec, build_tower
from lilt.towers.vision import wrap_vision
from tests.towers.families import (
    CAPTIONS,
    CONTRACT,
    VIT,
    OwnReader,
    OwnTransformer,
    Patches,
    batch,
    open_clip_arch,
    tiny,
    tokens,
    word_tokenizer,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
QUERY = "image_px=32&patch_size=8&embed_dim=32&depth=2&num_heads=2"


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def timm_features(model: Any, images: torch.Tensor = IMAGES) -> torch.Tensor:
    model.reset_classifier(0)
    return model.eval()(images)


def test_a_timm_name_without_weights_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    spec = f"timm:vit_tiny_patch16_224?pretrained=false&{QUERY}"
    one, two = build_tower(spec, "vision").eval(), build_tower(spec, "vision").eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one(IMAGES), two(IMAGES))
    assert one.fingerprint == two.fingerprint
    assert one.dim == 32 and len(one.blocks) == 2 and one.spec == spec


def test_a_timm_folder_gives_the_features_of_timm(tiny_vision: str) -> None:
    tower = build_tower(tiny_vision, "vision").eval()
    expected = timm.create_model(f"local-dir:{tiny_vision.removeprefix('timm:')}", pretrained=True)
    same(tower(IMAGES), timm_features(expected))
    assert not isinstance(tower.body.head, nn.Linear)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_weights_file_with_a_classifier_loads_without_it(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT)  # type: ignore[arg-type]
    file = tmp_path / f"weights.{ending}"
    save_file(model.state_dict(), file) if ending == "safetensors" else torch.save(model.state_dict(), file)
    tower = build_tower(f"timm:vit_tiny_patch16_224?weights={file}&{QUERY}", "vision").eval()
    same(tower(IMAGES), timm_features(model))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_an_hf_weights_file_replaces_those_of_the_folder(bert: str, ending: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = hf.BertModel(hf.AutoConfig.from_pretrained(bert.removeprefix("hf:")))
    file = tmp_path / f"weights.{ending}"
    state = {f"bert.{name}": tensor for name, tensor in other.state_dict().items()}
    save_file(state, file) if ending == "safetensors" else torch.save({"state_dict": state}, file)
    tower = build_tower(f"{bert}?weights={file}", "text").eval()
    inputs = batch(tower)
    same(tower(inputs), other.eval()(**inputs).last_hidden_state[:, 0])


@pytest.mark.parametrize("pretrained", ["", "&pretrained=false"])
@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_file_of_weights_is_read_by_open_clip_whatever_is_said_of_its_own(
    side: str, pretrained: str, tmp_path: Path
) -> None:
    arch = open_clip_arch()
    model = open_clip.create_model(arch)
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}, file)
    tower = build_tower(f"open_clip:{arch}?weights={file}{pretrained}", side)
    assert all((p == 0.5).all() for p in tower.body.parameters())


def test_an_hf_vision_folder_gives_the_class_token_and_drops_the_untrained_pooler(hf_vit: str) -> None:
    tower = build_tower(hf_vit, "vision").eval()
    model = hf.AutoModel.from_pretrained(hf_vit.removeprefix("hf:")).eval()
    same(tower(IMAGES), model(IMAGES).last_hidden_state[:, 0])
    assert not [name for name, _ in tower.named_parameters() if "pooler" in name]


def test_an_hf_text_folder_in_half_precision_is_trained_in_full(bert: str) -> None:
    tower = build_tower(bert, "text").eval()
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    model = hf.AutoModel.from_pretrained(bert.removeprefix("hf:"), dtype=torch.float32).eval()
    inputs = batch(tower)
    same(tower(inputs), model(**inputs).last_hidden_state[:, 0])
    assert not [name for name, _ in tower.named_parameters() if "pooler" in name]


def test_a_decoder_is_read_at_its_last_token_without_a_cache() -> None:
    tower = tiny("gpt2")
    inputs = batch(tower)
    hidden = tower.body(**inputs)
    assert getattr(hidden, "past_key_values", None) is None
    last = inputs["attention_mask"].sum(1) - 1
    same(tower(inputs), hidden.last_hidden_state[torch.arange(3), last])


@pytest.mark.parametrize("side", ["vision", "text"])
def test_both_sides_of_an_open_clip_folder_give_what_open_clip_encodes(open_clip_folder: str, side: str) -> None:
    tower = build_tower(open_clip_folder, side).eval()
    name = f"local-dir:{open_clip_folder.removeprefix('open_clip:')}"
    model: Any = open_clip.create_model(name).eval()
    if side == "vision":
        same(tower(IMAGES), model.encode_image(IMAGES))
    else:
        same(tower(tokens(tower, *CAPTIONS)), model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS)))


def test_an_open_clip_name_without_weights_is_the_same_each_time() -> None:
    spec = f"open_clip:{open_clip_arch()}?pretrained=false"
    assert build_tower(spec, "vision").fingerprint == build_tower(spec, "vision").fingerprint
    assert build_tower(spec, "text").fingerprint != build_tower(spec, "vision").fingerprint


def test_a_factory_is_called_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from tests.towers.families import *\n"
        "def eye(): return OwnTransformer(Patches()), CONTRACT\n"
        "def reader(): return OwnReader(nn.Embedding(VOCABULARY, 32)), word_tokenizer()\n"
        "def half(): return OwnTransformer(Patches())\n"
        "def number(): return 3\n"
    )
    (tmp_path / "my_towers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    tower = build_tower("py:my_towers:eye", "vision").eval()
    assert isinstance(tower, Tower) and tower(IMAGES).shape == (2, 32)
    assert tower.fingerprint == build_tower("py:my_towers:eye", "vision").fingerprint
    text = build_tower("py:my_towers:reader?layers=1", "text")
    assert text(tokens(text, *CAPTIONS)).shape == (3, 32) and len(text.blocks) == 1
    with pytest.raises(ValueError, match=r"came without a preprocess; .* pass preprocess="):
        build_tower("py:my_towers:half", "vision")
    with pytest.raises(ValueError, match=r"returned int; expected nn\.Module"):
        build_tower("py:my_towers:number", "vision")
    with pytest.raises(ValueError, match="has no attribute 'eyes'; expected an importable package"):
        build_tower("py:my_towers:eyes", "vision")
    sys.modules.pop("my_towers")


def test_own_modules_give_their_mean_token_or_their_vector() -> None:
    module = OwnTransformer(Patches())
    same(build_tower(module, "vision", CONTRACT).eval()(IMAGES), module(IMAGES).mean(1))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    same(build_tower(flat, "vision", CONTRACT)(IMAGES), flat(IMAGES))
    reader = OwnReader(nn.Embedding(20, 32)).eval()
    tower = build_tower(reader, "text", word_tokenizer())
    inputs = batch(tower)
    keep = inputs["attention_mask"].unsqueeze(-1)
    same(tower(inputs), (reader(**inputs) * keep).sum(1) / keep.sum(1))


def test_an_own_preprocess_is_a_callable_from_picture_to_tensor() -> None:
    tower = build_tower(OwnTransformer(Patches()), "vision", lambda picture: torch.zeros(3, 32, 32))
    assert isinstance(tower.contract, ImageContract) and tower.contract.transform is not None
    example = tower.example()
    assert isinstance(example, torch.Tensor) and example.shape == (1, 3, 32, 32)


def test_an_own_tokenizer_is_a_callable_from_texts_to_ids() -> None:
    embed = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6))
    tower = build_tower(embed, "text", lambda texts: torch.tensor([[len(text) % 9, 1, 0] for text in texts]))
    assert tower(tokens(tower, "a", "bcd")).shape == (2, 6)


def test_a_finished_tower_is_taken_as_it_is() -> None:
    tower = tiny("vit")
    assert build_tower(tower, "vision") is tower


def test_a_timm_model_built_at_another_size_keeps_that_size() -> None:
    contract = tiny("vit").contract
    assert isinstance(contract, ImageContract) and contract.image_px == 32


def test_the_fingerprint_changes_with_any_weight() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", **VIT)  # type: ignore[arg-type]
    before = build_tower(model, "vision").fingerprint
    assert build_tower(model, "vision").fingerprint == before
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-3
    assert build_tower(model, "vision").fingerprint != before


@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("given", [ImageContract(32, (0.1,) * 3, (0.9,) * 3), lambda picture: IMAGES[0]])
def test_a_librarys_module_with_a_preprocess_of_ones_own_is_still_run_as_the_librarys(library: str, given: Any) -> None:
    torch.manual_seed(0)
    if library == "timm":
        module: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)  # type: ignore[arg-type]
        expected = timm_features(copy.deepcopy(module))
    else:
        module = hf.ViTModel(
            hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        )
        expected = module.eval()(IMAGES).last_hidden_state[:, 0]
    tower = wrap_vision(module, given, "mine", TowerSpec("module")).eval()
    same(tower(IMAGES), expected)
    contract = tower.contract
    assert isinstance(contract, ImageContract)
    assert contract == given if isinstance(given, ImageContract) else contract.transform is given
