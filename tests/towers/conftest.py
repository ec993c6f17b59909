"""Folders saved on the spot by the libraries themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from tests.towers.families import SMALL, open_clip_arch, word_tokenizer


def save_hf(folder: Path, config: Any, companion: Any, dtype: torch.dtype = torch.float32) -> str:
    """Save a transformers model of a config with its tokenizer or image processor; return the spec."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.AutoModel.from_config(config).to(dtype).save_pretrained(folder)
    companion.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="session")
def hf_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformers ViT with a pooler, for 32 px, normalised by 0.5."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    config = hf.ViTConfig(**size, image_size=32, patch_size=8)  # type: ignore[arg-type]
    return save_hf(tmp_path_factory.mktemp("vit"), config, processor)


@pytest.fixture(scope="session")
def hf_dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformers DINOv2 whose processor resizes the shorter edge to 40 px and crops 32."""
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    processor = hf.BitImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    return save_hf(tmp_path_factory.mktemp("dinov2"), config, processor)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of three layers saved in half precision."""
    config = hf.BertConfig(**SMALL | {"num_hidden_layers": 3})
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return save_hf(tmp_path_factory.mktemp("bert"), config, word_tokenizer(model_input_names=inputs), torch.float16)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A RoBERTa with the 514 positions of the published ones."""
    config = hf.RobertaConfig(**SMALL | {"max_position_embeddings": 514})
    return save_hf(tmp_path_factory.mktemp("roberta"), config, word_tokenizer("<pad>", "<s>", "</s>"))


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as open_clip publishes it: open_clip_config.json and open_clip_model.safetensors."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = open_clip.get_model_config(open_clip_arch())
    norm = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": norm}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = open_clip.create_model(open_clip_arch())
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:{folder}"
