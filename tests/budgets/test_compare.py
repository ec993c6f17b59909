"""The comparison: what is counted is what training trains and saves, and sizes are fitted as far as they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lilt import checkpoint
from lilt.budgets import Budget, Comparison, compare
from lilt.budgets.compare import default_specs
from lilt.budgets.fit import fit, fitted_option
from lilt.budgets.limits import Limit, keep, parse_limits
from lilt.build import build_model
from lilt.config import ModelConfig
from lilt.policies import aliases, policies
from lilt.towers import meta_tower
from tests.budgets.pairs import family, reader
from tests.towers.families import open_clip_arch, tiny

PROJECTION = "linear(dim=16)"


@pytest.fixture(scope="module")
def tiny_pair(tiny_vision: str, tiny_text: str) -> Comparison:
    """All policies on two tiny towers."""
    towers = meta_tower(tiny_vision, "vision"), meta_tower(tiny_text, "text")
    return compare(*towers, default_specs(), projection=PROJECTION, batch_size=4, text_tokens=7)


def test_every_policy_has_a_budget(tiny_pair: Comparison) -> None:
    assert not tiny_pair.refused
    assert {row.policy for row in tiny_pair.rows} == {*policies.names(), *aliases}
    full = next(row for row in tiny_pair.rows if row.policy == "full")
    assert full.step_flops_ratio == 1.0 and full.percent == 100.0
    frozen = next(row for row in tiny_pair.rows if row.policy == "frozen")
    assert frozen.trainable == 2 * (32 * 16 + 16) + 1
    assert frozen.step_flops_ratio < 0.5
    assert all(row.saved_bytes > frozen.saved_bytes for row in tiny_pair.rows if row.policy != "frozen")


@pytest.mark.parametrize("policy", [*policies.names(), *aliases])
def test_a_budget_is_what_a_built_model_trains_and_its_checkpoint_weighs(
    policy: str, tiny_pair: Comparison, tiny_vision: str, tiny_text: str, tmp_path: Path
) -> None:
    row = next(row for row in tiny_pair.rows if row.policy == policy)
    config = ModelConfig(vision=tiny_vision, text=tiny_text, policy=policy, projection=PROJECTION)
    model = build_model(config)
    assert row.trainable == sum(p.numel() for p in model.trained().values())
    assert row.total == sum(p.numel() for p in model.parameters())
    assert row.percent == 100 * row.trainable / row.total
    assert row.optimizer_bytes == 8 * row.trainable
    file = checkpoint.save(model, config, tmp_path) / checkpoint.ADAPTER
    assert row.adapter_bytes == file.stat().st_size
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert row.step_bytes == weights + 12 * row.trainable + row.saved_bytes


@pytest.mark.parametrize("shared", ["mlp", "transformer(n=2,points=2,types=true)"])
def test_a_shared_encoder_is_counted_and_fitted_around(shared: str, tiny_vision: str, tiny_text: str) -> None:
    towers = meta_tower(tiny_vision, "vision"), meta_tower(tiny_text, "text")
    heads: dict[str, Any] = {"projection": PROJECTION, "shared": shared}
    (row,) = compare(*towers, ["layernorm"], **heads).rows
    model = build_model(ModelConfig(vision=tiny_vision, text=tiny_text, policy="layernorm", **heads))
    assert row.trainable == sum(p.numel() for p in model.trained().values())
    assert row.total == sum(p.numel() for p in model.parameters())
    (without,) = compare(*towers, ["layernorm"], projection=PROJECTION).rows
    assert row.trainable > without.trainable and row.saved_bytes > without.saved_bytes
    limit = Limit("max_trainable", "", "trainable", row.trainable + 1000)
    (fitted,) = compare(*towers, ["layernorm+lora(targets=attention)"], **heads, trainable=limit).rows
    assert row.trainable < fitted.trainable <= limit.most


def test_towers_with_weights_are_compared_too_and_stay_as_they_are() -> None:
    vision = tiny("vit")
    before = {name: (p.requires_grad, p.device) for name, p in vision.named_parameters()}
    found = compare(vision, reader(), ["layernorm"], batch_size=2)
    assert found.rows[0].trainable == 5 * 2 * 32 + 2 * 6 + 32 * 256 + 6 * 256 + 2 * 256 + 1
    assert {name: (p.requires_grad, p.device) for name, p in vision.named_parameters()} == before
    assert vision.fates is None


def test_a_policy_that_a_tower_cannot_take_is_refused_with_its_reason() -> None:
    found = compare(family("resnet"), family("bert"), ["lora", "layernorm", "lilt"], batch_size=2)
    assert [row.policy for row in found.rows] == ["layernorm"]
    assert found.refused.keys() == {"lora", "lilt"}
    assert "has no weights for targets=qkv; it has" in found.refused["lora"]


def test_a_wrong_spec_is_an_error_whatever_the_towers_take() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'layernrom'; known: .*Did you mean 'layernorm'"):
        compare(family("vit"), reader(), ["frozen", "layernrom"])


def test_the_batch_is_what_was_asked_for() -> None:
    vision, text = family("vit"), family("bert")
    about = compare(vision, text, ["frozen"], batch_size=5, text_tokens=9).about
    assert "32x32 px" in about and "9 tokens), batch of 5, linear(dim=256); no weights were read" in about
    assert "24 tokens" in compare(vision, text, ["frozen"], text_tokens=500).about  # its positions
    clip = meta_tower(f"open_clip:{open_clip_arch()}", "text")
    assert "16 tokens" in compare(vision, clip, ["frozen"], text_tokens=5).about  # always its whole context


# --- fitting


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ("lora", (0, "r")), ("lora(targets=mlp,alpha=32)", (0, "r")), ("layernorm+adapter(place=input)", (1, "width")),
        ("prompt", (0, "n")), ("last", (0, "n")),
        ("lora(r=8)", None), ("lora(8)", None), ("adapter(reduction=8)", None), ("layernorm", None), ("lilt", None),
        ("lora+prompt", None), ("lora(r=2)+prompt", None),
    ],
)  # fmt: skip
def test_a_size_is_fitted_where_none_was_written(spec: str, option: tuple[int, str] | None) -> None:
    assert fitted_option(spec) == option


def test_a_fit_is_the_largest_size_within() -> None:
    for best in (1, 2, 3, 7, 8, 63, 64, 100):
        found = fit("layernorm+lora(targets=mlp)", lambda spec, best=best: int(spec[:-1].split("r=")[1]) <= best, 64)  # type: ignore[misc]
        assert found == f"layernorm+lora(targets=mlp,r={min(best, 64)})"
    assert fit("lora", lambda spec: False, 64) == "lora(r=1)"
    assert fit("layernorm", lambda spec: False, 64) == "layernorm"


@pytest.mark.parametrize("limit", ["12%", "5k"])
@pytest.mark.parametrize("spec", ["lora", "adapter", "prompt", "prompt(depth=deep)", "lora(targets=all)+layernorm"])
def test_one_size_more_would_exceed_the_limit(spec: str, limit: str) -> None:
    vision, text = family("vit"), family("bert")
    bound = parse_limits(max_trainable=limit)[0]

    def row(what: str, fitted: Limit | None = None) -> Budget:
        return compare(vision, text, [what], batch_size=2, projection=PROJECTION, trainable=fitted).rows[0]

    found = row(spec, bound)
    assert bound.allows(found)
    name, size = found.policy.rsplit("=", 1)
    end = size.index(")")
    larger = row(f"{name}={int(size[:end]) + 1}{size[end:]}")
    # a prompt is no longer than the wider tower is wide, however little it trains
    assert not bound.allows(larger) or int(size[:end]) == 32


def test_a_size_that_one_tower_cannot_take_is_too_large() -> None:
    bound = parse_limits(max_trainable="99%")[0]
    found = compare(family("vit"), family("bert"), ["last"], batch_size=2, trainable=bound)
    assert [row.policy for row in found.rows] == ["last(n=2)"]


# --- limits


@pytest.mark.parametrize(
    ("option", "text", "key", "most"),
    [
        ("max_trainable", "1%", "percent", 1.0), ("max_trainable", ".5 %", "percent", 0.5),
        ("max_trainable", "2M", "trainable", 2e6), ("max_trainable", "1_500", "trainable", 1500),
        ("max_trainable", "1.5k", "trainable", 1500), ("max_trainable", "3b", "trainable", 3e9),
        ("max_step", "0.5", "step_flops_ratio", 0.5), ("max_memory", "8GiB", "step_bytes", 8 * 2**30),
        ("max_memory", "500 MB", "step_bytes", 5e8), ("max_memory", "4096", "step_bytes", 4096),
    ],
)  # fmt: skip
def test_limits_are_read(option: str, text: str, key: str, most: float) -> None:
    (limit,) = parse_limits(**{option: text})
    assert (limit.key, limit.most) == (key, most)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("max_trainable", "some", "max_trainable='some' cannot be read; expected a share such as 1% or a count"),
        ("max_trainable", "1%%", "cannot be read"), ("max_trainable", "1e6", "cannot be read"),
        ("max_trainable", "0", "leaves nothing"), ("max_step", "50%", "expected a part of a full step such as 0.5"),
        ("max_memory", "8GiG", "max_memory='8GiG' cannot be read; expected a size such as 8GiB"),
        ("max_memory", "-1", "cannot be read"),
    ],
)  # fmt: skip
def test_a_limit_that_cannot_be_read_says_how_to_write_it(option: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_limits(**{option: text})


def test_the_limits_keep_what_is_within_all_of_them(tiny_pair: Comparison) -> None:
    limits = parse_limits("30%", "0.75", "600KiB")
    kept = keep(tiny_pair.rows, limits)
    assert 0 < len(kept) < len(tiny_pair.rows)
    for row in tiny_pair.rows:
        within = row.percent <= 30 and row.step_flops_ratio <= 0.75 and row.step_bytes <= 600 * 1024
        assert (row in kept) == within
    most = parse_limits("99%", "0.01", "1GiB")
    with pytest.raises(
        ValueError, match=rf"none of {len(tiny_pair.rows)} .*: max_step=0.01 leaves out .*, frozen\), max_tr"
    ):
        keep(tiny_pair.rows, most)
