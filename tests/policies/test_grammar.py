"""How policies are written, joined and refused."""

from __future__ import annotations

import dataclasses

import pytest

from lilt.policies import Blocks, Plan, Policy, aliases, catalogue, parse_policy, policies
from lilt.policies.adapter import Adapter
from lilt.policies.lora import Lora
from lilt.policies.select import Frozen, Full, LayerNorm
from tests.policies.conformance import planned, tuned
from tests.towers.families import tiny


def test_a_composition_is_parsed_in_order_with_its_options() -> None:
    parts = parse_policy("lora(4, targets=q|v, alpha=8) + layernorm(blocks=last:6)", "vision")
    assert parts == (Lora(r=4, targets="q|v", alpha=8.0), LayerNorm(Blocks("last:6")))


def test_an_alias_means_something_else_on_each_side() -> None:
    assert parse_policy("lit", "vision") == (Frozen(),)
    assert parse_policy("lit", "text") == (Full(),)
    assert parse_policy("lilt", "vision") == (Adapter(4, place="input"), LayerNorm())
    assert parse_policy("lilt", "text") == (Adapter(4, place="output"), LayerNorm())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layernrom", r"unknown policy 'layernrom'; known: .*lilt.*Did you mean 'layernorm'\?"),
        ("lilt(4)", "lilt is a fixed composition and takes no options; write out"),
        ("lora(rank=4)", r"lora has no option 'rank'; it takes: r, alpha, targets, blocks"),
        ("lora(target=q)", r"has no option 'target'.*Did you mean 'targets'\?"),
        ("lora(r=many)", "lora: r=many is not of type int"),
        ("lora(r=0)", "r=0; expected a rank of at least 1"),
        ("lora(targets=qk)", r"unknown target 'qk'.*Did you mean"),
        ("lora(r=4", "unbalanced parentheses"),
        ("adapter(place=outputs)", r"unknown place 'outputs'.*Did you mean 'output'\?"),
        ("adapter(reduction=0)", "reduction=0; expected at least 1"),
        ("layernorm(blocks=half)", "blocks='half' is no slice; write all, last:6"),
        ("last(1,2)", "last takes 1 values"),
        ("frozen(1)", "frozen takes 0 values"),
        ("layernorm+", "cannot read ''"),
    ],
)
def test_a_misspelt_policy_says_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(spec, "vision")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last:2", [3, 4]),
        ("first:2", [0, 1]),
        ("last:9", [0, 1, 2, 3, 4]),
        ("1:3", [1, 2]),
        ("3:", [3, 4]),
        (":2", [0, 1]),
        ("-2:", [3, 4]),
        ("3", [3]),
        ("-1", [4]),
    ],
)
def test_blocks_select_like_slices(text: str, chosen: list[int]) -> None:
    assert list(Blocks.parse(text).of(5)) == chosen


@pytest.mark.parametrize("spec", ["layernorm", "bitfit", "attention", "mlp", "lora", "adapter"])
def test_a_block_slice_keeps_a_policy_inside_those_blocks(spec: str) -> None:
    paths = {edit.path for edit in planned(f"{spec}(blocks=last:1)", tiny("vit")).edits}
    assert paths == {e.path for e in planned(spec, tiny("vit")).edits if e.path.startswith("blocks.1.")}
    assert paths


def test_an_empty_slice_matches_nothing_and_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no normalisation; it has 2 blocks"):
        planned("layernorm(blocks=7)", tiny("vit"))


def test_rules_that_only_open_a_parameter_agree_and_the_first_keeps_it() -> None:
    tower = tiny("vit")
    joint = planned("layernorm+bitfit", tower)
    paths = [edit.path for edit in joint.edits]
    assert len(paths) == len(set(paths))
    assert {edit.path: edit.rule for edit in joint.edits}["blocks.0.norm1.bias"] == "layernorm"
    assert {edit.path: edit.rule for edit in joint.edits}["blocks.0.attn.qkv.bias"] == "bitfit"
    assert joint.trained == planned("bitfit+layernorm", tower).trained
    assert planned("full+layernorm", tower) == planned("full", tower)


@pytest.mark.parametrize("family", ["vit", "eva02", "own_vision", "gpt2"])
@pytest.mark.parametrize("spec", ["full+lora", "lora+attention", "lora(r=2)+lora(r=4)", "lora(targets=all)+mlp"])
def test_two_policies_that_change_one_weight_are_an_error(spec: str, family: str) -> None:
    with pytest.raises(ValueError, match=r"both want .*weight; a weight has one policy: leave one out"):
        planned(spec, tiny(family))


def test_two_adapters_at_one_place_are_an_error_and_at_two_places_are_not() -> None:
    with pytest.raises(ValueError, match=r"adapter and adapter both want blocks\.0\.attn\.proj\.adapter"):
        planned("adapter+adapter(8)", tiny("vit"))
    assert tuned("adapter+adapter(place=input)", tiny("vit")).fates


def test_lora_beside_bitfit_trains_both_on_every_way_of_reading_a_weight() -> None:
    for family in ("vit", "eva02", "own_vision", "bert"):
        rules = {edit.rule for edit in (tuned("lora+bitfit", tiny(family)).fates or {}).values()}
        assert rules == {"lora", "bitfit"}


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_is_a_frozen_dataclass_that_declares_itself(name: str) -> None:
    cls = policies[name]
    assert issubclass(cls, Policy) and cls.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().n = 3  # type: ignore[attr-defined]
    assert 0 < cls.lr < 1
    assert isinstance(cls.mergeable, bool) and isinstance(cls.identity_at_start, bool)


def test_the_catalogue_lists_every_policy_and_alias_with_a_line() -> None:
    rows = catalogue()
    assert [row["policy"] for row in rows] == [*policies.names(), *aliases]
    assert all(row["about"] for row in rows)
    row = next(row for row in rows if row["policy"] == "lora")
    assert parse_policy(row["spec"], "text") == parse_policy("lora", "text")


def test_every_edit_says_by_whose_rule_and_why_and_at_what_rate() -> None:
    joint: Plan = planned("lora+layernorm", tiny("beit"))
    assert {(e.rule, e.lr) for e in joint.edits} == {("lora", Lora.lr), ("layernorm", LayerNorm.lr)}
    assert {e.why for e in joint.edits} == {"weight parametrization: read functionally", "normalisation"}
