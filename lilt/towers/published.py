"""Configurations of common published models, so that their shapes are known without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from lilt.registry import nearest


class Published(NamedTuple):
    """A transformers model type, what differs from the defaults of its config, and the image side it was made for."""

    model_type: str
    fields: dict[str, Any]
    image_px: int | None = None


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MINI = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
XLMR = ROBERTA | {"vocab_size": 250002}
MODERN_LARGE = LARGE | {"num_hidden_layers": 28, "intermediate_size": 2624}
VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
DINOV2 = {"image_size": 518, "patch_size": 14}
DINOV2_LARGE = DINOV2 | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
DINOV2_GIANT = DINOV2 | {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}

# owners that a name may be written with or without
OWNERS = ("google-bert", "FacebookAI", "distilbert", "google-t5")
PUBLISHED = {
    "bert-base-uncased": Published("bert", {}),
    "bert-base-cased": Published("bert", {"vocab_size": 28996}),
    "bert-large-uncased": Published("bert", LARGE),
    "bert-large-cased": Published("bert", LARGE | {"vocab_size": 28996}),
    "bert-base-multilingual-cased": Published("bert", {"vocab_size": 119547}),
    "bert-base-multilingual-uncased": Published("bert", {"vocab_size": 105879}),
    "princeton-nlp/unsup-simcse-bert-base-uncased": Published("bert", {}),
    "princeton-nlp/sup-simcse-bert-base-uncased": Published("bert", {}),
    "roberta-base": Published("roberta", ROBERTA),
    "roberta-large": Published("roberta", LARGE | ROBERTA),
    "xlm-roberta-base": Published("xlm-roberta", XLMR),
    "xlm-roberta-large": Published("xlm-roberta", LARGE | XLMR),
    "distilbert-base-uncased": Published("distilbert", {}),
    "distilbert-base-cased": Published("distilbert", {"vocab_size": 28996}),
    "distilbert-base-multilingual-cased": Published("distilbert", {"vocab_size": 119547}),
    "sentence-transformers/all-MiniLM-L6-v2": Published("bert", MINI | {"num_hidden_layers": 6}),
    "sentence-transformers/all-MiniLM-L12-v2": Published("bert", MINI),
    "sentence-transformers/all-mpnet-base-v2": Published("mpnet", {"max_position_embeddings": 514}),
    "microsoft/mpnet-base": Published("mpnet", {"max_position_embeddings": 514}),
    "answerdotai/ModernBERT-base": Published("modernbert", {}),
    "answerdotai/ModernBERT-large": Published("modernbert", MODERN_LARGE),
    "intfloat/multilingual-e5-small": Published("bert", MINI | {"vocab_size": 250037}),
    "intfloat/multilingual-e5-base": Published("xlm-roberta", XLMR),
    "intfloat/multilingual-e5-large": Published("xlm-roberta", LARGE | XLMR),
    "t5-small": Published("t5", {}),
    "t5-base": Published("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "t5-large": Published("t5", {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}),
    "google/vit-base-patch16-224": Published("vit", {}, 224),
    "google/vit-base-patch16-224-in21k": Published("vit", {}, 224),
    "google/vit-large-patch16-224": Published("vit", LARGE, 224),
    "facebook/dino-vits16": Published("vit", VIT_SMALL, 224),
    "facebook/dino-vitb16": Published("vit", {}, 224),
    "facebook/dinov2-small": Published("dinov2", DINOV2 | {"hidden_size": 384, "num_attention_heads": 6}, 224),
    "facebook/dinov2-base": Published("dinov2", DINOV2, 224),
    "facebook/dinov2-large": Published("dinov2", DINOV2_LARGE, 224),
    "facebook/dinov2-giant": Published("dinov2", DINOV2_GIANT | {"use_swiglu_ffn": True}, 224),
}  # fmt: skip


def find_published(name: str) -> Published | None:
    """Return the entry of a published model, if it is in the table."""
    owner, _, rest = name.rpartition("/")
    return PUBLISHED.get(rest if owner in OWNERS else name)


def config_of(name: str) -> Any:
    """Return the config of a folder, of a published model (from the table), or of another name on the hub.

    Raises ValueError when the hub has no such name or cannot be reached.
    """
    known = None if Path(name).exists() else find_published(name)
    if known is not None:
        return AutoConfig.for_model(known.model_type, **known.fields)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no config of {name!r}: {str(error).splitlines()[0]} Expected a folder with config.json, a name on the "
            f"hub, or one of those known without a network: {', '.join(PUBLISHED)}.{nearest(name, PUBLISHED)}"
        ) from error
