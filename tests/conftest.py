"""Tiny real components: a timm folder, a transformers folder with its tokenizer, and a folder of pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.models import save_for_hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220),
    "yellow": (230, 220, 40), "white": (245, 245, 245), "black": (15, 15, 15),
}  # fmt: skip
CAPTIONS = ("a {} picture", "all of it is {}", "{} paint on paper")
WORDS = ["a", "all", "of", "it", "is", "picture", "paint", "on", "paper", "photo", "boat", "the"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many workers as cores: more threads only wait for one another


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision for the life of a process; every test starts anew."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec of a ViT of width 32 and depth 2 for 32 px, in a folder saved by timm."""
    folder = tmp_path_factory.mktemp("vision")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)  # type: ignore[arg-type]
    with torch.no_grad():
        # fresh weights are so small that the class token hardly sees the picture; pretrained ones are larger
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    save_for_hf(model, str(folder), model_args=size, safe_serialization=True)
    return f"timm:{folder}"


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec of a BERT of width 32 and depth 2 with dropout 0.1 and a word tokenizer, saved by transformers."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        BertModel(config).save_pretrained(folder)
    return f"hf:{folder}"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `[CLS] … [SEP]` around, at most 16 of them."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *COLOURS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, mask_token="[MASK]", **names)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 plain pictures, four of each colour in other shades, and manifest.jsonl: 12 train, 6 val, 6 test.

    Each has three captions that say its colour; PNG and JPEG, not all square.
    """
    folder = tmp_path_factory.mktemp("pictures")
    splits = ("train", "train", "val", "test")
    lines = []
    for number, (colour, rgb) in enumerate(COLOURS.items()):
        for take, split in enumerate(splits):
            shade = tuple(min(255, max(0, value + 12 * take - 18)) for value in rgb)
            name = f"{colour}{take}.{'jpg' if take % 2 else 'png'}"
            picture = Image.new("RGB", (40 + 4 * take, 40), shade)
            # a grey mark, so that turning, mirroring and cropping change the picture
            picture.paste((128, 128, 128), (3, 4, 11 + number, 12 + take))
            picture.save(folder / name)
            captions = [text.format(colour) for text in CAPTIONS]
            lines.append(json.dumps({"image": name, "captions": captions, "split": split}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def settings(tiny_vision: str, tiny_text: str) -> dict[str, Any]:
    """The fields of a small ModelConfig."""
    return {"vision": tiny_vision, "text": tiny_text, "projection": "linear(dim=16)"}
