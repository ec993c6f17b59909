"""Where the branches of a block begin and end, in every family."""

from __future__ import annotations

import pytest

from tests.policies.conformance import planned
from tests.towers.families import tiny


def test_swinv2_norms_after_its_branches_so_the_input_is_that_of_the_attention() -> None:
    paths = [edit.path for edit in planned("adapter(place=input)", tiny("swinv2")).edits]
    assert paths[:2] == ["layers.0.blocks.0.attn", "layers.0.blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("family", "per_block"),
    [("vit", 2), ("swin", 2), ("convnext", 1), ("own_vision", 2), ("open_clip_vision", 2), ("t5", 2), ("gpt2", 2)],
)
@pytest.mark.parametrize("place", ["output", "input"])
def test_every_branch_of_every_block_gets_one(family: str, per_block: int, place: str) -> None:
    tower = tiny(family)
    joint = planned(f"adapter(place={place})", tower)
    assert len(joint.edits) == per_block * len(tower.blocks)


@pytest.mark.parametrize("place", ["output", "input", "parallel"])
@pytest.mark.parametrize(("branches", "only"), [("mlp", ("mlp", "norm2")), ("attention", ("attn", "norm1"))])
def test_one_branch_alone_has_one_adapter_a_block(place: str, branches: str, only: tuple[str, ...]) -> None:
    edits = planned(f"adapter(place={place},branches={branches})", tiny("vit")).edits
    assert len(edits) == 2
    assert all(edit.path.split(".")[2] in only for edit in edits)


def test_a_tower_without_the_branch_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"has no attention branches; it has \d+ blocks"):
        planned("adapter(branches=attention)", tiny("convnext"))
