"""What a role map says counts: the roles, the counts that follow, the blocks; what it cannot say is explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lilt.towers import Tower, build_tower
from lilt.towers.roles import WORDS, matches
from lilt.towers.vision import OwnVision
from tests.policies.conformance import planned, trained, tuned
from tests.towers.families import CONTRACT, batch, timm_tower
from tests.towers.private import HIDDEN, LISTED, ROLES, WIDTH, Eye, Listed, Stage, private

SQUARE = WIDTH * WIDTH + WIDTH  # a projection of the attention
UP, DOWN = WIDTH * HIDDEN + HIDDEN, HIDDEN * WIDTH + WIDTH
BOTTLENECK = 2 * WIDTH * (WIDTH // 4) + WIDTH // 4 + WIDTH
TWICE = "lora(r=2,targets={})".format
# word -> a map that says it, a policy that reads it, and how many values that trains in the two units of Listed;
# without a map all of mix and ff is taken for an MLP, and Rms for nothing
CASES: dict[str, tuple[dict[str, str], str, int]] = {
    "norm": ({"**.r?": "norm"}, "layernorm", 2 * 2 * WIDTH),
    "attention": ({"**.mix": "attention"}, "attention", 2 * 4 * SQUARE),
    "attention.q": ({"**.wq_a": "attention.q"}, TWICE("q"), 2 * 2 * 2 * WIDTH),
    "attention.k": ({"**.wk_a": "attention.k"}, TWICE("k"), 2 * 2 * 2 * WIDTH),
    "attention.v": ({"**.wq_a": "attention.k", "**.wv_a": "attention.v"}, TWICE("v"), 2 * 2 * 2 * WIDTH),
    "attention.qkv": ({"**.up": "attention.qkv"}, TWICE("v"), 2 * 2 * (WIDTH + HIDDEN // 3)),
    "attention.kv": ({"**.up": "attention.kv"}, TWICE("v"), 2 * 2 * (WIDTH + HIDDEN // 2)),
    "attention.out": ({"**.wv_a": "attention.out"}, TWICE("out"), 2 * 2 * 2 * WIDTH),
    "mlp": ({"**.mix": "attention", "**.mix.wo_a": "mlp"}, "mlp", 2 * (SQUARE + UP + DOWN)),
    "mlp.in": ({"**.mix": "attention", "**.down": "mlp.in"}, "adapter", 2 * (BOTTLENECK + 2 * 48 * 12 + 12 + 48)),
    "mlp.out": ({"**.mix": "attention", "**.up": "mlp.out"}, "adapter", 2 * (BOTTLENECK + 2 * 48 * 12 + 12 + 48)),
    "conv": ({"**.mix": "conv"}, "mlp", 2 * (UP + DOWN)),
    "embedding": ({"**.mix": "embedding"}, "mlp", 2 * (UP + DOWN)),
    "other": ({"**.mix": "other"}, "mlp", 2 * (UP + DOWN)),
    "block": ({"stages.1": "block"}, "mlp", 4 * SQUARE + UP + DOWN),
}


def roles_of(tower: Tower, under: str) -> dict[str, str]:
    """Return role and part of the leaves under a path, by the rest of their path."""
    leaves = [leaf for leaf in tower.anatomy.leaves if leaf.path.startswith(under)]
    return {leaf.path.removeprefix(under): f"{leaf.role}.{leaf.part}".strip(".") for leaf in leaves}


def test_every_word_has_its_case() -> None:
    assert set(CASES) == set(WORDS)


@pytest.mark.parametrize("word", CASES)
def test_a_line_of_the_map_changes_what_a_policy_trains(word: str) -> None:
    roles, policy, count = CASES[word]
    assert word in roles.values()
    tower = private(Listed, roles)
    assert planned(policy, tower).trained == count
    assert tower.roles == roles
    assert sum(p.numel() for p in trained(tuned(policy, tower)).values()) == count


@pytest.mark.parametrize("word", CASES)
def test_the_counts_are_not_those_of_the_guess(word: str) -> None:
    _, policy, count = CASES[word]
    try:
        assert planned(policy, private(Listed, None)).trained != count
    except ValueError as error:
        assert "Where the guess is wrong, say what is what: vision_roles={" in str(error)


def test_an_empty_map_keeps_every_guess() -> None:
    assert private(Listed, {}).anatomy.describe() == private(Listed, None).anatomy.describe()


def test_what_no_line_names_keeps_its_guess() -> None:
    guessed, said = roles_of(private(Listed, None), "stages.1."), roles_of(private(Listed, LISTED), "stages.1.")
    assert guessed["mix.wq_a"] == "mlp.in" and guessed["r1"] == "other"
    assert {path: said[path] for path in ("ff.up", "ff.down")} == {"ff.up": "mlp.in", "ff.down": "mlp.out"}
    assert said == {
        "r1": "norm", "mix.wq_a": "attention.q", "mix.wk_a": "attention.k", "mix.wv_a": "attention.v",
        "mix.wo_a": "attention.out", "r2": "norm", "ff.up": "mlp.in", "ff.down": "mlp.out",
    }  # fmt: skip


def test_a_named_output_is_the_only_one() -> None:
    said = roles_of(private(Listed, LISTED | {"**.up": "mlp.out", "**.wv_a": "attention.out"}), "stages.0.")
    assert [path for path, word in said.items() if word.endswith(".out")] == ["mix.wv_a", "ff.up"]
    assert said["mix.wo_a"] == "attention" and said["ff.down"] == "mlp.in"


@pytest.mark.parametrize(
    ("roles", "found"),
    [
        # a line speaks of what is inside, where a normalisation of known class stays one …
        ({"blocks.*": "conv"}, {"norm1": "norm", "attn.qkv": "conv", "mlp.fc2": "conv"}),
        # … unless it is named itself
        ({"blocks.*": "conv", "**.norm1": "other"}, {"norm1": "other", "norm2": "norm", "attn.qkv": "conv"}),
        # the line that names the deeper module counts, wherever it stands
        (
            {"**.attn.qkv": "attention.qkv", "blocks.*.attn": "mlp"},
            {"attn.qkv": "attention.qkv", "attn.proj": "mlp.in"},
        ),
        # of two that name the same module, the later
        ({"**.attn": "conv", "blocks.*.attn": "embedding"}, {"attn.qkv": "embedding"}),
        ({"blocks.*.attn": "embedding", "**.attn": "conv"}, {"attn.qkv": "conv"}),
        ({"blocks.1.mlp.*": "other"}, {"mlp.fc1": "other", "mlp.fc2": "other", "attn.qkv": "attention.qkv"}),
    ],
)
def test_of_several_lines_the_nearest_and_then_the_last_counts(roles: dict[str, str], found: dict[str, str]) -> None:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    tower = build_tower(timm_tower("vit_tiny_patch16_224", **size).body, "vision", roles=roles)
    said = roles_of(tower, "blocks.1.")
    assert {path: said[path] for path in found} == found


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a.*.c", ["a.b.c", "a.12.c"], ["a.c", "a.b.b.c", "a.b.c.d"]),
        ("a*", ["a", "abc"], ["a.b", "ba"]),
        ("**.c", ["c", "a.c", "a.b.c"], ["c.a", "a.bc"]),
        ("a.**.c", ["a.c", "a.b.c", "a.b.b.c"], ["c", "a.b"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["b.a"]),
        ("stage[12].r?", ["stage1.r1", "stage2.rr"], ["stage3.r1", "stage1.r", "stage1.r12"]),
        ("A", ["A"], ["a"]),
    ],
)
def test_patterns_are_of_dotted_paths(pattern: str, yes: list[str], no: list[str]) -> None:
    assert all(matches(pattern, path) for path in yes)
    assert not any(matches(pattern, path) for path in no)


def test_blocks_need_no_list_and_stand_in_the_order_of_their_calls() -> None:
    assert private(Eye, None).anatomy.blocks == ()
    tower = private(Eye, ROLES)
    assert tower.anatomy.blocks == ("stage_a", "stage_b") and tower.anatomy.token_width == WIDTH
    assert tower.blocks == [tower.body.stage_a, tower.body.stage_b]
    assert roles_of(tower, "stage_a.") == roles_of(private(Listed, LISTED), "stages.0.")
    for spec, names in (("layernorm(blocks=last:1)", {"stage_b"}), ("layernorm(blocks=0)", {"stage_a"})):
        assert {edit.path.split(".")[0] for edit in planned(spec, tower).edits} == names
    assert {edit.path.split(".")[0] for edit in planned("last(1)", tower).edits} == {"stage_b", "last"}
    assert [edit.path for edit in planned("deep_adapter", tower).edits] == ["stage_b"]


class Looped(Eye):
    """The first unit runs again after the last."""

    def forward(self, images: Tensor) -> Tensor:
        return self.stage_a(super().forward(images))


def test_a_block_that_runs_twice_stands_where_it_first_ran() -> None:
    assert private(Looped, ROLES).anatomy.blocks == ("stage_a", "stage_b")


class Streams(nn.Module):
    """Two streams of other widths, run in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.slim = nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(3, 16, 4, 4)
        self.left = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 48, batch_first=True) for _ in range(2)])
        self.right = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        a, b = (conv(images).flatten(2).transpose(1, 2) for conv in (self.wide, self.slim))
        for left, right in zip(self.left, self.right, strict=True):
            a, b = left(a), right(b)
        return torch.cat([a.mean(1), b.mean(1)], -1)


def test_of_two_streams_one_can_be_named() -> None:
    assert private(Streams, None).anatomy.blocks == ("left.0", "right.0", "left.1", "right.1")
    tower = private(Streams, {"left.*": "block"})
    assert tower.anatomy.blocks == ("left.0", "left.1") and tower.anatomy.token_width == WIDTH
    assert planned("deep_adapter", tower).trained == 12 * WIDTH**2 + 13 * WIDTH
    assert planned("adapter(blocks=last:1)", tower).trained == 2 * BOTTLENECK


def test_a_list_with_names_of_its_own_needs_no_map() -> None:
    tower = private(lambda: VisionTransformer(32, 8, 2, 2, WIDTH, 48), None)  # torchvision names its layers
    assert tower.anatomy.blocks == ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")
    assert planned("layernorm", tower).trained == 5 * 2 * WIDTH
    tower = cut(VisionTransformer(32, 8, 2, 2, WIDTH, 48), 1, {})
    assert planned("layernorm", tower).trained == 3 * 2 * WIDTH


def cut(module: nn.Module, layers: int, roles: dict[str, str]) -> Tower:
    """Build with layers=K as a spec would."""
    return OwnVision(module.eval(), "vision", "py:somebody:eye", None, CONTRACT).finish(layers, roles)


def test_only_the_first_blocks_can_be_kept_where_they_stand_in_a_list() -> None:
    roles = LISTED | {"stages.2.r1": "other"}  # of a block that falls away
    tower = cut(Listed(depth=3), 2, roles)
    assert tower.anatomy.blocks == ("stages.0", "stages.1") and len(tower.body.stages) == 2
    assert planned("layernorm", tower).trained == 5 * WIDTH
    assert planned("layernorm", private(Listed, LISTED)).trained == 5 * WIDTH

    mixed = nn.Sequential(Eye().embed, Stage(), Stage(), Stage(), Listed().last)
    tower = cut(mixed, 1, {"[123]": "block", "4": "norm", "*.r?": "norm"})
    assert tower.anatomy.blocks == ("1",)
    assert planned("layernorm", tower).trained == 3 * WIDTH
    assert tower(batch(tower)).shape == (3, WIDTH)


def test_blocks_that_are_called_by_name_cannot_be_left_out() -> None:
    message = (
        "layers=1: the block 'stage_b' of 'py:somebody:eye' is called by name .*; expected .*; put them in one, or"
    )
    with pytest.raises(ValueError, match=message):
        cut(Eye(), 1, ROLES)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"**.rms": "norm"}, r"'\*\*.rms' names no module with parameters; it has last, stage_b.r1, .*; write \* for"),
        ({"stage_c": "block"}, r"'stage_c' names no module .* Did you mean 'stage_\w'\?"),
        ({"**.r1.gain": "norm"}, r"'\*\*.r1.gain' is the parameter 'stage_b.r1.gain'; expected a module; name its mod"),
        ({"**.r1": "nrom"}, r"unknown role 'nrom' for '\*\*.r1'; known: norm, attention, .*block. Did you mean 'norm'"),
        ({"**.r1": None}, r"unknown role None for '\*\*.r1'; known: norm"),
        (
            {"**.mix": "attention.q"},
            r"says attention.q of 'stage_b.mix', which is a Mixer; expected nn.Linear; write at",
        ),
        ({"**.r1": "mlp.out"}, r"says mlp.out of 'stage_b.r1', which is a Rms; expected nn.Linear; write mlp for the"),
        (
            {"stage_a.**": "block"},
            r"both 'stage_a' and 'stage_a.r1' inside it are named block; .*; name only one level",
        ),
        ({"stage_a": "block", "*.mix": "block"}, r"both 'stage_a' and 'stage_a.mix' inside it are named block"),
        (["**.r1"], r"roles of the vision tower 'module:Eye': got list; expected a mapping .*\?roles=FILE"),
    ],
)
def test_a_map_that_cannot_be_followed_says_why(roles: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private(Eye, roles)


def test_blocks_that_never_run_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'stages' is named block and its forward is never called.*; name the mod"):
        private(Listed, {"stages": "block"})


def test_a_long_list_of_modules_is_shortened() -> None:
    with pytest.raises(ValueError) as caught:
        private(lambda: Listed(depth=30), {"x": "norm"})
    assert "stages.*.mix.wq_a, stages.*.mix.wk_a" in str(caught.value) and "stages.7" not in str(caught.value)
    with pytest.raises(ValueError, match=r"it has m0, .*, m23 and 16 more; write"):
        private(lambda: nn.ModuleDict({f"m{i}": nn.Linear(4, 4) for i in range(40)}), {"x": "norm"})


def test_a_finished_tower_keeps_the_map_it_was_built_with() -> None:
    tower = private(Eye, ROLES)
    assert build_tower(tower, "vision", roles=ROLES) is tower
    with pytest.raises(
        ValueError, match=r"the finished vision tower 'module:Eye' has the roles .*, not \{'last'.*; exp"
    ):
        build_tower(tower, "vision", roles={"last": "norm"})
