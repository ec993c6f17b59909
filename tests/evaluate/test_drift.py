"""Drift per block against CKA by Gram matrices on tokens that were taken out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilt import DualEncoder
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.drift import compared, evenly
from lilt.policies import merge
from lilt.towers import Tower
from tests.evaluate.test_cka import by_gram
from tests.policies.conformance import tuned as tuned_tower
from tests.test_merge import shaken
from tests.towers.families import batch, tiny


@torch.no_grad()
def by_hand(tower: Tower, block: int, inputs: Any, plain: Tower | None = None) -> Tensor:
    """The real tokens (N, W) that a block gives; those that plain does not have stand after its prefix."""
    kept: list[Any] = []
    handle = tower.blocks[block].register_forward_hook(lambda _m, _a, out: kept.append(out))
    tower(inputs)
    handle.remove()
    out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    if plain is not None:
        length = plain.tokens(inputs).features.shape[1]
        prefix = plain.tokens(inputs).prefix
        out = torch.stack([torch.cat([row[:prefix], row[len(row) - length + prefix :]]) for row in out])
    return out[inputs["attention_mask"].bool()] if isinstance(inputs, dict) else out.flatten(0, -2)


@pytest.mark.parametrize("family", ["vit", "swin", "hf_vit", "open_clip_vision", "own_vision", "bert", "gpt2", "t5"])
def test_blocks_are_compared_token_by_token(family: str) -> None:
    tower = tuned_tower("full", tiny(family))
    base = tiny(family).body
    with torch.no_grad():
        for number, parameter in enumerate(tower.body.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05)
    inputs = batch(tower)
    found = {name: moments.cka() for name, moments in compared(tower, base, inputs).items()}
    assert list(found) == [*(f"block {i}" for i in range(len(tower.blocks))), "pooled"]
    plain = tiny(family)
    for i in range(len(tower.blocks)):
        expected = by_gram(by_hand(plain, i, inputs), by_hand(tower, i, inputs))
        assert found[f"block {i}"] == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        assert found["pooled"] == pytest.approx(by_gram(plain(inputs), tower(inputs)), abs=1e-4)
    assert min(found.values()) < 0.999


def test_grids_are_rows_of_their_width() -> None:
    tower = tuned_tower("full", tiny("convnext"))
    inputs = batch(tower)
    moments = compared(tower, tiny("convnext").body, inputs)
    assert {name: m.means[0].shape[0] for name, m in moments.items()}["block 0"] == 16
    assert all(m.cka() == pytest.approx(1, abs=1e-5) for m in moments.values())


@pytest.mark.parametrize("spec", ["prompt(3)", "prompt(2,deep)", "adapter", "lora", "deep_adapter"])
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_what_is_added_is_switched_off_for_the_base_and_left_out(family: str, spec: str) -> None:
    tower = tuned_tower(spec, tiny(family))
    with torch.no_grad():
        for tensor in (p for p in tower.body.parameters() if p.requires_grad):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    inputs, plain = batch(tower), tiny(family)
    found = compared(tower, None, inputs)
    for number in (0, 1):
        before, after = by_hand(plain, number, inputs), by_hand(tower, number, inputs, plain)
        moments = found[f"block {number}"]
        assert moments.count == len(before) == len(after)
        for mean, tokens in zip(moments.means, (before, after), strict=True):
            torch.testing.assert_close(mean.float(), tokens.mean(0), rtol=1e-4, atol=1e-4)
        if number == 1:
            assert (before - after).abs().max() > 1e-3
    with merge.disabled(tower, None):
        assert compared(tower, None, inputs)["block 1"].cka() == pytest.approx(1, abs=1e-5)


def test_the_task_looks_at_both_towers(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task("drift(samples=5)")(tuned, setting))
    names = [f"{side}/{place}" for side in ("vision", "text") for place in ("block 0", "block 1", "pooled")]
    assert [name for name in found if not name.startswith("num_")] == names
    assert (found["num_vision"], found["num_text"]) == (5, 5)
    assert all(0 < found[name] < 0.999 for name in names)


def test_a_locked_tower_has_not_drifted(tiny_vision: str, tiny_text: str, setting: Setting) -> None:
    model = shaken(vision=tiny_vision, text=tiny_text, policy="lit", projection="linear(dim=16)")
    found = dict(parse_task("drift(samples=6)")(model, setting))
    assert all(found[f"vision/{place}"] == pytest.approx(1, abs=1e-5) for place in ("block 0", "block 1", "pooled"))
    assert found["text/block 1"] < 0.999


def test_batches_do_not_matter(tuned: DualEncoder, setting: Setting) -> None:
    whole, parts = (
        dict(parse_task("drift(samples=6)")(tuned, Setting(setting.data, setting.image_root, batch_size=n)))
        for n in (6, 4)
    )
    assert parts == pytest.approx(whole, abs=1e-4)


def test_samples_are_spread_over_the_split() -> None:
    assert evenly("abcdefghij", 4) == ["a", "c", "f", "h"]
    assert evenly("abc", 9) == ["a", "b", "c"]


def test_nothing_to_compare_is_an_error(tuned: DualEncoder, setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"drift\(samples=1\): expected at least 2 to compare"):
        dict(parse_task("drift(samples=1)")(tuned, setting))
    (tmp_path / "x.csv").write_text("image,caption,split\ngone.png,a boat,test\n")
    with pytest.raises(
        ValueError, match=r"drift: 0 of 1 images could be read \(first fault: .*gone.png.*expected at least 2"
    ):
        dict(parse_task(f"drift(data={tmp_path / 'x.csv'})")(tuned))
