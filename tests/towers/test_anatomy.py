"""Blocks, roles, parts and call order, found by type and by one forward, on towers of every family."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilt.towers import build_tower
from lilt.towers.anatomy import is_norm
from tests.towers.families import CONTRACT, FAMILIES, VOCABULARY, timm_tower, tiny, word_tokenizer

# blocks; roles of the leaves inside one block; parts of its attention; which of its leaves are read functionally
PRE = "norm2 attention2 mlp2"
EXPECTED = {
    "vit": (2, PRE, "qkv out", ""),
    "siglip": (2, PRE, "qkv out", ""),
    "deit3": (2, "norm2 attention2 mlp2 other2", "qkv out", ""),
    "dinov2": (2, "norm2 attention2 mlp2 other2", "qkv out", ""),
    "dinov3": (2, "norm2 attention3 mlp2 other1", "- qkv out", "attn.qkv"),
    "eva02": (2, "norm2 attention3 mlp2", "- qkv out", "attn.qkv"),
    "eva02_base": (2, "norm3 attention4 mlp3", "q k v out", ""),
    "beit": (2, "norm2 attention3 mlp2 other1", "- qkv out", "attn.qkv"),
    "swin": (3, "norm2 attention3 mlp2", "- qkv out", ""),
    "swinv2": (3, "norm2 attention5 mlp2", "- - - qkv out", "attn.qkv"),
    "convnext": (5, "norm1 mlp2 conv1 other1", "", ""),
    "resnet": (4, "norm3 conv3", "", ""),
    "hf_vit": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "open_clip_vision": (2, PRE, "qkv out", "attn.out_proj"),
    "own_vision": (2, PRE, "qkv out", "self_attn.out_proj"),
    "own_mlp": (0, "", "", ""),
    "bert": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "roberta": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "distilbert": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "mpnet": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "modernbert": (2, PRE, "qkv out", ""),
    "xlm-roberta": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "t5": (2, "norm2 attention4 mlp2", "q k v out", ""),
    "gpt2": (2, PRE, "qkv out", ""),
    "llama": (2, "norm2 attention4 mlp3", "q k v out", ""),
    "open_clip_text": (2, PRE, "qkv out", "attn.out_proj"),
    "own_text": (2, PRE, "qkv out", "self_attn.out_proj"),
}
ORDER = ("norm", "attention", "mlp", "conv", "embedding", "other")


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("twins_svt_small", {"embed_dims": (16, 16), "num_heads": (1, 2), "depths": (2, 2), "wss": (4, 4)}, "qkv q kv"),
        ("cait_xxs24_224", {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32}, "qkv q k v"),
    ],
)
def test_attentions_whose_class_says_it_shortly_are_found(name: str, options: dict[str, Any], parts: str) -> None:
    leaves = timm_tower(name, **options).anatomy.leaves
    assert {leaf.part for leaf in leaves if leaf.role == "attention"} - {""} == {*parts.split(), "out"}
    dense = [leaf for leaf in leaves if isinstance(leaf.module, nn.Linear)]
    assert all(leaf.role == "attention" for leaf in dense if ".attn." in leaf.path)
    assert all(leaf.role == "mlp" for leaf in dense if ".mlp." in leaf.path)


def test_every_family_is_described() -> None:
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anatomy_is_that_of_the_architecture(family: str) -> None:
    count, roles, parts, functional = EXPECTED[family]
    anatomy = tiny(family).anatomy
    assert len(anatomy.blocks) == count
    # the second block: the first of ModernBERT has no norm, the first of T5 the table of positions
    leaves = [leaf for leaf in anatomy.leaves if leaf.block == 1]
    found = Counter(leaf.role for leaf in leaves)
    assert " ".join(f"{role}{found[role]}" for role in ORDER if found[role]) == roles
    attention = [leaf.part or "-" for leaf in leaves if leaf.role == "attention"]
    assert sorted(attention) == sorted(parts.split())
    silent = (
        {leaf.path.removeprefix(f"{anatomy.blocks[1]}.") for leaf in leaves if leaf.order is None} if count else set()
    )
    assert silent == set(functional.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_in_depth_order_and_leaves_cover_every_parameter_once(family: str) -> None:
    tower = tiny(family)
    calls: list[int] = []
    for number, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    tower(tower.example())
    assert calls == list(range(len(tower.blocks)))
    names = [
        f"{leaf.path}.{name}".lstrip(".")
        for leaf in tower.anatomy.leaves
        for name, _ in leaf.module.named_parameters(recurse=False)
    ]
    assert sorted(names) == sorted(name for name, _ in tower.body.named_parameters())


@pytest.mark.parametrize("family", [f for f in FAMILIES if "mlp2" in EXPECTED[f][1] or "mlp3" in EXPECTED[f][1]])
def test_the_last_layer_of_an_mlp_is_its_output_and_the_others_its_input(family: str) -> None:
    leaves = [leaf for leaf in tiny(family).anatomy.leaves if leaf.block == 1 and leaf.role == "mlp"]
    leaves.sort(key=lambda leaf: leaf.order or 0)
    assert [leaf.part for leaf in leaves] == ["in"] * (len(leaves) - 1) + ["out"]


@pytest.mark.parametrize(
    ("family", "path", "role"),
    [
        ("vit", "", "embedding"),
        ("vit", "patch_embed.proj", "embedding"),
        ("vit", "norm", "norm"),
        ("swin", "layers.1.downsample.reduction", "other"),
        ("convnext", "stem.0", "embedding"),
        ("resnet", "bn1", "norm"),
        ("llama", "norm", "norm"),
        ("llama", "embed_tokens", "embedding"),
        ("t5", "shared", "embedding"),
        ("bert", "embeddings.LayerNorm", "norm"),
        ("own_mlp", "2", "mlp"),
    ],
)
def test_what_stands_outside_the_blocks_has_its_role(family: str, path: str, role: str) -> None:
    leaf = next(leaf for leaf in tiny(family).anatomy.leaves if leaf.path == path)
    assert (leaf.role, leaf.block) == (role, None)


def test_an_anatomy_describes_itself_in_a_line() -> None:
    embeddings = "embedding (1 Conv2d, 1 VisionTransformer)"
    line = f"2 blocks with norm (5 LayerNorm), attention (4 Linear), mlp (4 Linear), {embeddings}"
    assert tiny("vit").anatomy.describe() == line


def test_looking_leaves_no_hook_and_the_mode_as_it_was() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.Dropout())
    build_tower(module.train(), "vision", CONTRACT)
    assert module.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


class GainNorm(nn.Module):
    """A normalisation by its name, whatever it owns."""

    def __init__(self, *shape: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        ((8,), True),
        ((1, 1, 8), True),
        ((1, 8, 1, 1), True),
        ((1,), True),
        ((), True),
        ((4, 8), False),
        ((1, 4, 8), False),
    ],
)
def test_a_normalisation_owns_vectors_with_or_without_other_axes(shape: tuple[int, ...], norm: bool) -> None:
    assert is_norm(GainNorm(*shape)) == norm


class Packed(nn.Module):
    """A reader that packs its captions itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.map = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        rows = [self.words(ids[keep]) for ids, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        return torch.nested.to_padded_tensor(self.map(torch.nested.nested_tensor(rows)), 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_widths_are_those_of_tokens_and_nested_tensors_have_none() -> None:
    leaves = {leaf.path: leaf for leaf in build_tower(Packed(), "text", word_tokenizer()).anatomy.leaves}
    assert [(leaf.reads, leaf.gives) for leaf in leaves.values()] == [(None, None), (None, None)]
    leaves = {leaf.path: leaf for leaf in tiny("bert").anatomy.leaves}
    inside, words = leaves["encoder.layer.0.intermediate.dense"], leaves["embeddings.word_embeddings"]
    assert (inside.reads, inside.gives, words.reads, words.gives) == (32, 48, None, 32)
    leaves = {leaf.path: leaf for leaf in tiny("resnet").anatomy.leaves}
    assert {(leaf.reads, leaf.gives) for leaf in leaves.values()} == {(None, None)}
