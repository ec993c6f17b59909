import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from lilt import demo
from lilt.demo.captions import captions
from lilt.demo.lexicon import ATTRIBUTE_OF, COLOURS, RELATION_OF, SHAPES, SIZES, TEXTURES
from lilt.demo.render import render
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
    assert tuple(own["input_size"]) == (3, IMAGE_PX, IMAGE_PX)
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


def test_the_vision_tower_knows_a_scene_again_on_another_background() -> None:
    scenes = [scene for scene, _ in zip(stream(0), range(60), strict=False)]
    pixels = [pil_to_tensor(render(replace(scene, seed=seed))) for seed in (1, 2) for scene in scenes]
    with torch.no_grad():
        cls = vision()((torch.stack(pixels) / 255 - 0.5) / 0.25)
    one, other = F.normalize(cls - cls.mean(0), dim=1).chunk(2)
    # untrained, it knows one in twenty
    assert ((one @ other.T).argmax(1) == torch.arange(60)).float().mean() > 0.8


def test_the_text_tower_tells_from_the_context_what_kind_of_word_is_hidden() -> None:
    trained = AutoModel.from_pretrained(demo.TEXT).float().eval()
    torch.manual_seed(0)
    untrained = AutoModel.from_config(AutoConfig.from_pretrained(demo.TEXT)).float().eval()
    # the untrained one knows the place in the sentence only
    assert share_of_kinds_found(trained) > share_of_kinds_found(untrained) + 0.1


def share_of_kinds_found(tower: Any) -> float:
    """How often the state most like that of a hidden word belongs to a hidden word of the same kind."""
    tables = (SHAPES, COLOURS, SIZES, TEXTURES)
    kind = {word: k for k, table in enumerate(tables) for said in table.values() for word in said}
    tokenizer, rng = AutoTokenizer.from_pretrained(demo.TEXT), random.Random(0)
    kinds, states = [], []
    for scene, _ in zip(stream(0), range(300), strict=False):
        ids = tokenizer(captions(scene, rng, 1)[0])["input_ids"]
        said = tokenizer.convert_ids_to_tokens(ids)
        hidden = rng.choice([k for k, word in enumerate(said) if word in kind])
        kinds.append(kind[said[hidden]])
        ids[hidden] = tokenizer.mask_token_id
        with torch.no_grad():
            states.append(tower(torch.tensor([ids])).last_hidden_state[0, hidden])
    rows, own = torch.stack(states), torch.tensor(kinds)
    likeness = F.normalize(rows - rows.mean(0), dim=1)
    nearest = (likeness @ likeness.T).fill_diagonal_(-1).argmax(1)
    return float((own[nearest] == own).float().mean())


def test_the_text_folder_says_how_to_pool() -> None:
    declared = json.loads((demo.TEXT / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    assert [name for name, chosen in declared.items() if chosen is True] == ["pooling_mode_mean_tokens"]
    assert declared["word_embedding_dimension"] == 128


def test_both_towers_are_small() -> None:
    files = [file for folder in (demo.VISION, demo.TEXT) for file in folder.rglob("*.*")]
    assert sum(file.stat().st_size for file in files) < 6e6
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((demo.VISION / "config.json").read_text())["num_classes"] == 0
