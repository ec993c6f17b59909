"""Tiny towers of every family the suites run over, built by the libraries themselves from small configs."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers as hf
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor, nn

from lilt.towers import ImageContract, Tower, build_tower

WORDS = ["a", "the", "red", "blue", "green", "big", "small", "two", "boat", "house", "cat", "dog", "under", "near"]
CAPTIONS = ["a red boat", "the big green house under a blue cat", "two small dog near the boat"]


def word_tokenizer(pad: str = "[PAD]", start: str = "[CLS]", end: str = "[SEP]", **options: Any) -> Any:
    """A word-level tokenizer that frames a caption as `start … end`; the pad token has id 1 like RoBERTa's."""
    vocabulary = {token: i for i, token in enumerate([start, pad, end, "[UNK]", *WORDS])}
    tokenizer = Fast(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    names = {"cls_token": start, "sep_token": end, "bos_token": start, "eos_token": end, "unk_token": "[UNK]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, **(names | options))


VOCABULARY = len(WORDS) + 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 24, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def timm_tower(name: str, **options: Any) -> Tower:
    return build_tower(timm.create_model(name, pretrained=False, **options), "vision")


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}


def hf_vision() -> Tower:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    return build_tower(hf.ViTModel(config), "vision", processor)


def hf_text(family: str, **options: Any) -> Tower:
    config = hf.AutoConfig.for_model(family, **SMALL, **TRANSFORMERS[family], **options)
    auto: Any = hf.AutoModelForTextEncoding if config.is_encoder_decoder else hf.AutoModel
    return build_tower(auto.from_config(config), "text", word_tokenizer())


@functools.cache
def open_clip_arch() -> str:
    """Register a tiny open_clip architecture and return its name."""
    folder = Path(tempfile.mkdtemp())
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    return "tiny-clip"


class OwnTransformer(nn.Module):
    """Somebody's own encoder of patches or ids, made of torch's layers: tokens (B, L, 32)."""

    def __init__(self, embed: nn.Module):
        super().__init__()
        self.embed = embed
        make = functools.partial(nn.TransformerEncoderLayer, 32, 2, 48, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if keep is None else ~keep)
        return x


class OwnReader(OwnTransformer):
    """The same for captions: called with the token tensors by name."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, attention_mask.bool())


class Patches(nn.Module):
    """Non-overlapping patches as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 32, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2)


CONTRACT = ImageContract(32)


def own_mlp() -> Tower:
    layers = (nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 48), nn.GELU(), nn.Linear(48, 32))
    return build_tower(nn.Sequential(*layers), "vision", CONTRACT)


VISION: dict[str, Callable[[], Tower]] = {
    "vit": lambda: timm_tower("vit_tiny_patch16_224", **VIT),
    "siglip": lambda: timm_tower("vit_base_patch16_siglip_224", **VIT),
    "deit3": lambda: timm_tower("deit3_small_patch16_224", **VIT),
    "dinov2": lambda: timm_tower("vit_small_patch14_reg4_dinov2", **VIT),
    "dinov3": lambda: timm_tower("vit_small_patch16_dinov3_qkvb", **VIT),
    "eva02": lambda: timm_tower("eva02_tiny_patch14_224", **VIT),
    "eva02_base": lambda: timm_tower("eva02_base_patch14_224", **VIT),
    "beit": lambda: timm_tower("beitv2_base_patch16_224", **VIT),
    "swin": lambda: timm_tower("swin_tiny_patch4_window7_224", **SWIN),
    "swinv2": lambda: timm_tower("swinv2_tiny_window8_256", **SWIN),
    "convnext": lambda: timm_tower("convnext_tiny", depths=(1, 1, 2, 1), dims=(16, 16, 32, 32)),
    "resnet": lambda: timm_tower("test_resnet"),
    "hf_vit": hf_vision,
    "open_clip_vision": lambda: build_tower(f"open_clip:{open_clip_arch()}?pretrained=false", "vision"),
    "own_vision": lambda: build_tower(OwnTransformer(Patches()), "vision", CONTRACT),
    "own_mlp": own_mlp,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"hidden_dim": 48},
    "mpnet": {},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 2, "local_attention": 4},
    "xlm-roberta": {},
    "t5": {"d_kv": 16, "d_ff": 48},
    "gpt2": {"n_inner": 48},
    "llama": {"num_key_value_heads": 1},
}
TEXT: dict[str, Callable[[], Tower]] = {
    **{family: functools.partial(hf_text, family) for family in TRANSFORMERS},
    "open_clip_text": lambda: build_tower(f"open_clip:{open_clip_arch()}?pretrained=false", "text"),
    "own_text": lambda: build_tower(OwnReader(nn.Embedding(VOCABULARY, 32)), "text", word_tokenizer()),
}
FAMILIES = VISION | TEXT
SIDES = {name: "vision" if name in VISION else "text" for name in FAMILIES}


@functools.cache
def _built(family: str) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = FAMILIES[family]().eval()
        for tensor in (*tower.parameters(), *tower.buffers()):
            # gains, residual norms and biases start at 0 or 1e-6 and would hide what lies behind them
            if tensor.is_floating_point() and tensor.ndim == 1 and (tensor.abs() < 1e-3).all():
                tensor.data.normal_(0, 0.3)
    return tower


def tiny(family: str) -> Tower:
    """Return a fresh tower of a family, in eval mode, with all zero gains randomised."""
    built = _built(family)
    return copy.deepcopy(built, {id(built.contract): built.contract})


def batch(tower: Tower) -> Any:
    """Return a small batch for a tower: pictures of noise, or captions of several lengths."""
    if isinstance(tower.contract, ImageContract):
        px = tower.contract.image_px
        return torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(1))
    return tokens(tower, *CAPTIONS)


def tokens(tower: Tower, *captions: str) -> dict[str, Tensor]:
    """Return captions as a text tower wants them."""
    assert not isinstance(tower.contract, ImageContract)
    return tower.contract.pad(tower.contract.encode(captions)[0])
