"""Tiny models with both sides, built from small configs and saved in folders by the libraries themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.towers.families import SMALL, word_tokenizer

TEXTS = [
    "a red boat",
    "the big green house under a blue cat",
    "two",
    "two small dog near the boat " * 9,  # longer than every context
    "a cat near the big red house",
]
WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
VISION: dict[str, Any] = WIDTHS | {"image_size": 32, "patch_size": 8}


def pictures(count: int = 5) -> list[Image.Image]:
    """Coarse noise, each of its own size and none of them square."""
    made = []
    for number in range(count):
        coarse = torch.randint(0, 256, (4, 5, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        made.append(Image.fromarray(coarse.numpy()).resize((50 + 7 * number, 41), Image.Resampling.BICUBIC))
    return made


@dataclass(frozen=True)
class Family:
    """A config and an image processor of transformers; how its tokenizer pads and what it gives the model."""

    config: Callable[[], Any]
    processor: Callable[[], Any]
    padding: Any = True
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    context: int = 24
    tokenizer: Callable[..., Any] = word_tokenizer


def clip_processor() -> Any:
    return hf.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})


def siglip() -> Any:
    return hf.SiglipConfig(text_config=SMALL | {"projection_size": 32}, vision_config=VISION)


def squash() -> Any:
    return hf.SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.3] * 3)


def speller(model_input_names: list[str]) -> Any:
    """SigLIP 2's tokenizer, which lowers the case and pads on the left, with a word piece for each letter."""
    letters = [*map(chr, range(ord("a"), ord("z") + 1)), "▁"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}
    return hf.Siglip2Tokenizer(vocabulary, [], model_input_names=model_input_names)


def align() -> Any:
    tiny = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 24}
    return hf.AlignConfig(text_config=SMALL, vision_config=tiny, projection_dim=80)


def flava() -> Any:
    return hf.FlavaConfig(
        text_config=SMALL, image_config=VISION, multimodal_config=WIDTHS, hidden_size=32, projection_dim=24
    )


HF: dict[str, Family] = {
    "clip": Family(
        lambda: hf.CLIPConfig(text_config=SMALL | {"eos_token_id": 2}, vision_config=VISION, projection_dim=24),
        clip_processor,
    ),
    "siglip": Family(siglip, squash, "max_length", ("input_ids",)),
    "siglip_masked": Family(siglip, squash, "max_length"),
    "siglip2": Family(
        lambda: hf.Siglip2Config(
            text_config=SMALL | {"projection_size": 32, "vocab_size": 32, "max_position_embeddings": 48},
            vision_config=WIDTHS | {"patch_size": 8, "num_patches": 16},
        ),
        lambda: hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
        "max_length",
        ("input_ids",),
        48,
        speller,
    ),
    "align": Family(
        align,
        lambda: hf.EfficientNetImageProcessor(
            size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}, do_center_crop=True
        ),
        inputs=("input_ids", "token_type_ids", "attention_mask"),
    ),
    "altclip": Family(
        lambda: hf.AltCLIPConfig(text_config=SMALL | {"project_dim": 24}, vision_config=VISION, projection_dim=24),
        clip_processor,
        context=22,  # XLM-R counts positions from 2
    ),
    "flava": Family(
        flava,
        lambda: hf.FlavaImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}),
        inputs=("input_ids", "token_type_ids", "attention_mask"),
    ),
}


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights and statistics so that the answers of a model differ; fresh ones make all inputs look alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in ("logit_scale", "logit_bias", "temperature"):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            centre = parameter if parameter.ndim == 1 else 0.0  # gains stay around 1
            parameter.copy_(centre + 1.5 * torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


@torch.no_grad()
def learn_statistics(model: Any) -> None:
    """Let BatchNorm see noise, or what is behind thirty of them would hardly see the picture."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train().get_image_features(torch.randn(16, 3, 32, 32))
    model.eval()


def save_hf(name: str, folder: Path, family: Family | None = None) -> str:
    """Save a model of a family with its tokenizer and image processor; return its spec."""
    family = family or HF[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = shaken(hf.AutoModel.from_config(family.config()))
        if name == "align":
            learn_statistics(model)
        model.save_pretrained(folder)
    family.tokenizer(model_input_names=list(family.inputs)).save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return f"hf:{folder}"


@torch.no_grad()
def hf_embeddings(name: str, folder: Path, images: list[Image.Image], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit rows of images and texts as transformers gives them: its classes, its calls, one batch."""
    model: Any = hf.AutoModel.from_pretrained(folder).eval()
    tokens = hf.AutoTokenizer.from_pretrained(folder)(
        texts, padding=HF[name].padding, truncation=True, max_length=HF[name].context, return_tensors="pt"
    )
    pixels = hf.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    # only the two sides are asked for: FLAVA would join pictures and texts in pairs
    more = {"skip_multimodal_encoder": True} if name == "flava" else {}
    out = model(**tokens, **pixels, **more)
    if name == "flava":  # FlavaForPreTraining's contrastive loss reads the class tokens
        joint = model.image_projection(out.image_embeddings[:, 0]), model.text_projection(out.text_embeddings[:, 0])
    else:
        joint = out.image_embeds, out.text_embeds
    return F.normalize(joint[0], dim=-1), F.normalize(joint[1], dim=-1)


BODY = {"width": 32, "heads": 2, "layers": 2}
SEEN = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
READ = {"context_length": 12, "vocab_size": 49408, **BODY}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": SEEN, "text_cfg": READ},
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": READ
        | {
            "vocab_size": len(word_tokenizer()),
            "hf_tokenizer_name": "this",  # open_clip takes that of the folder
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    },
    "coca": {
        "embed_dim": 24,
        "custom_text": True,
        "multimodal_cfg": {**BODY, "context_length": 12, "vocab_size": 49408, "n_queries": 6, "attn_pooler_heads": 2},
        "vision_cfg": SEEN | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": READ | {"embed_cls": True, "output_tokens": True},
    },
}
PREPARED = {
    "clip": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"},
    "siglip": {"mean": [0.4] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    "coca": {"resize_mode": "longest", "fill_color": 90},
}


def save_open_clip(name: str, folder: Path, config: dict[str, Any] | None = None) -> str:
    """Save a model of a family as open_clip publishes it; return its spec."""
    told = {"model_cfg": config or OPEN_CLIP[name], "preprocess_cfg": PREPARED.get(name, {})}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    if name == "siglip":
        # SigLIP's end of text is its padding too
        word_tokenizer("[SEP]").save_pretrained(folder)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(shaken(model).state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:{folder}"


@torch.no_grad()
def open_clip_embeddings(name: str, folder: Path, images: list[Image.Image], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit rows of images and texts as open_clip gives them."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    pixels = torch.stack([preprocess(picture) for picture in images])
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


SAVE: dict[str, Callable[[str, Path], str]] = {"hf": save_hf, "open_clip": save_open_clip}
EMBED = {"hf": hf_embeddings, "open_clip": open_clip_embeddings}
ALL = [("hf", name) for name in HF] + [("open_clip", name) for name in OPEN_CLIP]
