import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from lilt import demo
from lilt.demo.captions import captions
from lilt.demo.lexicon import ATTRIBUTE_OF, COLOURS, RELATION_OF, SHAPES, SIZES, TEXTURES
from lilt.demo.scenes import IMAGE_PX, stream


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
        return {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118


def vision(pretrained: bool = True) -> Any:
    return timm.create_model(f"local-dir:{demo.VISION}", pretrained=pretrained, num_classes=0).eval()


def test_the_vision_folder_is_an_ordinary_timm_model() -> None:
    tower = vision()
    assert {name: tuple(value.shape) for name, value in tower.state_dict().items()} == stored(demo.VISION)
    assert tower(torch.zeros(2, 3, IMAGE_PX, IMAGE_PX)).shape == (2, 128)
    blank = vision(pretrained=False)
    assert not torch.equal(blank.blocks[0].attn.qkv.weight, tower.blocks[0].attn.qkv.weight)


def test_the_vision_folder_brings_its_own_preprocessing() -> None:
    own = vision().pretrained_cfg
    assert (own["mean"], own["std"]) == ([0.5] * 3, [0.25] * 3)
    assert own["input_size"] == (3, IMAGE_PX, IMAGE_PX)
    assert (own["interpolation"], own["crop_pct"], own["num_classes"]) == ("bicubic", 1.0, 0)


def test_the_text_folder_is_an_ordinary_transformers_model(caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower = AutoModel.from_pretrained(demo.TEXT)
        tokenizer = AutoTokenizer.from_pretrained(demo.TEXT)
    logging.disable_propagation()
    assert not caplog.records
    assert {name: tuple(value.shape) for name, value in tower.state_dict().items()} == stored(demo.TEXT)
    batch = tokenizer(["a red circle", "An azure box."], padding=True, return_tensors="pt")
    assert tower.float()(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, 128)


def test_the_tokenizer_knows_the_grammar_and_frames_a_caption() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.TEXT)
    ids = tokenizer("A red box.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "red", "box", ".", "[SEP]"]
    assert ATTRIBUTE_OF.keys() | RELATION_OF.keys() <= tokenizer.get_vocab().keys()
    texts = [
        text for scene, k in zip(stream(0), range(200), strict=False) for text in captions(scene, random.Random(k))
    ]
    encoded = tokenizer(texts)["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert max(map(len, encoded)) <= tokenizer.model_max_length
    assert tokenizer("zebra")["input_ids"][1] == tokenizer.unk_token_id


def test_the_text_tower_learned_which_words_are_alike() -> None:
    kind = {
        word: k
        for k, table in enumerate((SHAPES, COLOURS, SIZES, TEXTURES))
        for said in table.values()
        for word in said
    }
    tokenizer, tower = AutoTokenizer.from_pretrained(demo.TEXT), AutoModel.from_pretrained(demo.TEXT)
    names = sorted(kind)
    rows = tower.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(names)].float()
    likeness = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    nearest = (likeness @ likeness.T).fill_diagonal_(-1).argmax(1)
    # shapes lie among shapes, colours among colours; by chance it would be a quarter
    assert sum(kind[name] == kind[names[k]] for name, k in zip(names, nearest, strict=True)) > 0.9 * len(names)


def test_both_towers_are_small() -> None:
    files = [file for folder in (demo.VISION, demo.TEXT) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 6e6
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((demo.VISION / "config.json").read_text())["num_classes"] == 0
