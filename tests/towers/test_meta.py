"""Towers on the meta device are the built ones in all but their values, and need no weights, tokenizer or network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers as hf
from transformers.utils.generic import maybe_autocast

from lilt.towers import ImageContract, Tower, build_tower, meta_tower
from lilt.towers.meta import without_weights
from lilt.towers.published import PUBLISHED, config_of
from tests.towers.families import SMALL, TEXT, open_clip_arch, tiny

OWN = """
from tests.towers.families import *
def eye(): return OwnTransformer(Patches()), CONTRACT
def reader(): return OwnReader(nn.Embedding(VOCABULARY, 32)), word_tokenizer()
def embed(): return nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6)), lambda texts: torch.ones(len(texts), 5).long()
"""


def rotates() -> bool:
    """Say whether the rotary towers of transformers run on meta; those of 5.0 ask torch for autocast there."""
    try:
        with maybe_autocast("meta", enabled=False):
            return True
    except RuntimeError:
        return False


ROTARY = ("modernbert", "llama", "answerdotai/ModernBERT-base", "answerdotai/ModernBERT-large")
ROTATES = rotates()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look-up or connection fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def shapes(tower: Tower) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in (*tower.named_parameters(), *tower.named_buffers())}


def anatomy(tower: Tower) -> list[tuple[Any, ...]]:
    return [(leaf.path, leaf.role, leaf.part, leaf.block, leaf.order) for leaf in tower.anatomy.leaves]


@pytest.mark.parametrize(
    ("side", "spec"),
    [
        ("vision", "demo"), ("text", "demo"),
        ("vision", "timm:vit_tiny_patch16_224?depth=3&layers=2&pool=mean"), ("vision", "timm:test_resnet?image_px=48"),
        ("vision", "{tiny_vision}"), ("vision", "{hf_vit}?pool=cls"), ("vision", "{hf_dinov2}"),
        ("text", "{bert}?layers=2"), ("text", "{roberta}?pool=mean"),
        ("vision", "{open_clip_folder}?pool=cls"), ("text", "{open_clip_folder}"), ("text", "open_clip:tiny-clip"),
        ("vision", "py:meta_own:eye"), ("text", "py:meta_own:reader?layers=1"), ("text", "py:meta_own:embed"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_network")
def test_a_tower_without_weights_is_the_real_one(
    side: str, spec: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip_arch()
    (tmp_path / "meta_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    if "{" in spec:
        name = spec[1 : spec.index("}")]
        spec = spec.replace(f"{{{name}}}", request.getfixturevalue(name))
    found = meta_tower(spec, side)
    bare = spec if spec.startswith("py:") or spec == "demo" else f"{spec}{'&' if '?' in spec else '?'}pretrained=false"
    real = build_tower(bare, side)
    assert found.spec == spec
    assert {t.device.type for t in (*found.parameters(), *found.buffers())} == {"meta"}
    assert (found.dim, found.pool, found.anatomy.blocks) == (real.dim, real.pool, real.anatomy.blocks)
    assert shapes(found) == shapes(real)
    assert anatomy(found) == anatomy(real)
    assert found.anatomy.token_width == real.anatomy.token_width
    if isinstance(real.contract, ImageContract):
        assert isinstance(found.contract, ImageContract)
        assert found.contract.image_px == real.contract.image_px


@pytest.mark.parametrize("family", TEXT)
def test_a_text_tower_runs_forward_and_backward_on_meta(family: str) -> None:
    if family in ROTARY and not ROTATES:
        pytest.skip("this transformers asks for autocast on meta")
    tower = without_weights(tiny(family)).train()
    example = tower.example()
    assert isinstance(example, dict)
    out = tower({key: value.repeat(3, 1).to("meta") for key, value in example.items()})
    assert out.shape == (3, tower.dim)
    out.sum().backward()
    untouched = [name for name, p in tower.named_parameters() if p.grad is None]
    assert not [name for name in untouched if "token_type" not in name], untouched


@pytest.mark.usefixtures("no_network")
def test_a_config_alone_is_enough(bert: str, hf_vit: str, tmp_path: Path) -> None:
    for side, spec in (("text", bert), ("vision", hf_vit)):
        folder = tmp_path / side
        folder.mkdir()
        shutil.copy(Path(spec.removeprefix("hf:")) / "config.json", folder)
        assert shapes(meta_tower(f"hf:{folder}", side)) == shapes(meta_tower(spec, side))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        # totals as published, poolers that a tower drops included
        ("google-bert/bert-base-uncased", 109_482_240), ("bert-large-uncased", 335_141_888),
        ("bert-large-cased", 333_579_264), ("bert-base-multilingual-cased", 177_853_440),
        ("princeton-nlp/unsup-simcse-bert-base-uncased", 109_482_240),
        ("roberta-base", 124_645_632), ("FacebookAI/roberta-large", 355_359_744),
        ("xlm-roberta-base", 278_043_648), ("xlm-roberta-large", 559_890_432),
        ("distilbert-base-uncased", 66_362_880), ("distilbert-base-multilingual-cased", 134_734_080),
        ("sentence-transformers/all-MiniLM-L6-v2", 22_713_216), ("sentence-transformers/all-MiniLM-L12-v2", 33_360_000),
        ("sentence-transformers/all-mpnet-base-v2", 109_486_464), ("answerdotai/ModernBERT-base", 149_014_272),
        ("answerdotai/ModernBERT-large", 394_781_696), ("intfloat/multilingual-e5-small", 117_653_760),
        ("google-t5/t5-small", 35_330_816), ("t5-base", 109_628_544), ("t5-large", 334_939_648),
        ("google/vit-base-patch16-224", 86_389_248), ("facebook/dinov2-small", 22_056_576),
        ("facebook/dinov2-base", 86_580_480), ("facebook/dinov2-large", 304_368_640),
        ("facebook/dinov2-giant", 1_136_480_768),
    ],
)  # fmt: skip
def test_published_models_have_their_published_sizes(name: str, values: int) -> None:
    config = config_of(name)
    auto: Any = hf.AutoModelForTextEncoding if config.is_encoder_decoder else hf.AutoModel
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == values


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_is_a_tower(name: str) -> None:
    if name in ROTARY and not ROTATES:
        pytest.skip("this transformers asks for autocast on meta")
    side = "vision" if PUBLISHED[name].image_px else "text"
    tower = meta_tower(f"hf:{name}", side)
    example = tower.example()
    if side == "vision":
        assert isinstance(example, torch.Tensor) and example.shape == (1, 3, 224, 224)
    assert len(tower.blocks) >= 6 and tower.dim >= 384


def test_a_folder_counts_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf.BertConfig(**SMALL).save_pretrained("bert-base-uncased")
    assert config_of("bert-base-uncased").hidden_size == 32
    assert meta_tower("hf:bert-base-uncased", "text").dim == 32


@pytest.mark.usefixtures("no_network")
def test_an_unknown_name_without_a_network_names_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no config of 'bert-base-uncase': .*Did you mean 'bert-base-uncased'"):
        meta_tower("hf:bert-base-uncase", "text")
    with pytest.raises(ValueError, match=r"has no option 'width'; it takes"):
        meta_tower("hf:bert-base-uncased?width=3", "text")
    with pytest.raises(ValueError, match=r"unknown text tower 'hg:bert'; expected one of"):
        meta_tower("hg:bert", "text")


def test_a_missing_image_size_comes_from_the_config(hf_vit: str, tmp_path: Path) -> None:
    config = json.loads((Path(hf_vit.removeprefix("hf:")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 40}))
    contract = meta_tower(f"hf:{tmp_path}", "vision").contract
    assert isinstance(contract, ImageContract) and contract.image_px == 40
