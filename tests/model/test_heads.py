"""Every shared encoder under every projection: shapes, gradients, padding, the file, the seed; what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import lilt
from lilt import DualEncoder
from lilt.model import build_heads, build_shared, projections, shared_encoders
from lilt.towers import Inputs, Tower, TowerSpec, build_tower
from lilt.towers.vision import from_timm
from tests.model.pairs import HEADS, PAIRS, SHARED, joined, pair, wide
from tests.towers.families import CAPTIONS, FAMILIES, VIT, batch, open_clip_arch, timm_tower, tiny, tokens

every_pair = pytest.mark.parametrize(("shared", "projection"), PAIRS)
TOKENLESS = ("own_mlp", "open_clip_vision", "open_clip_text")


def test_the_suite_covers_the_registries() -> None:
    assert sorted(SHARED) == shared_encoders.names()
    assert sorted(HEADS) == projections.names()


@every_pair
def test_both_sides_come_out_as_unit_rows_of_one_width(shared: str, projection: str) -> None:
    core = pair(shared, projection)
    out = core(batch(core.vision), batch(core.text))
    width = core.projection.dim
    assert width == (16 if projection != "none" else core.shared.width or 32)
    assert out.features is not None and (out.hidden is not None) == ("points=2" in shared)
    for rows, features in zip((out.image, out.text), out.features, strict=True):
        assert rows.shape == features.shape == (3, width) and rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(rows, F.normalize(features, dim=-1))
        assert (features.norm(dim=1) - 1).abs().min() > 1e-3
    for rows in out.hidden or ():
        assert rows.shape == (3, out.hidden[0].shape[1])
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert torch.equal(out.image, core.encode_image(batch(core.vision)))
    assert torch.equal(out.text, core.encode_text(batch(core.text)))


@every_pair
def test_every_trained_tensor_gets_a_gradient(shared: str, projection: str) -> None:
    core = pair(shared, projection).train()
    trained = core.trained()
    assert {name for name, _ in core.shared.named_parameters(prefix="shared")} <= set(trained)
    assert {name for name, _ in core.projection.named_parameters(prefix="projection")} <= set(trained)
    out = core(batch(core.vision), batch(core.text))
    loss = out.scale
    for number, rows in enumerate((out.image, out.text, *(out.hidden or ()))):
        loss = loss + (rows * torch.randn(rows.shape, generator=torch.Generator().manual_seed(number))).sum()
    loss.backward()
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0] == []
    frozen = [p for name, p in core.named_parameters() if name not in trained]
    assert frozen and all(p.grad is None for p in frozen)


@every_pair
def test_padding_changes_nothing(shared: str, projection: str) -> None:
    core = pair(shared, projection)
    images = batch(core.vision)
    together, alone = (core(images, words) for words in (batch(core.text), tokens(core.text, CAPTIONS[0])))
    torch.testing.assert_close(together.text[:1], alone.text, rtol=0, atol=1e-5)
    if together.hidden is not None:
        torch.testing.assert_close(together.hidden[1][:1], alone.hidden[1], rtol=0, atol=1e-5)


@every_pair
def test_autocast_gives_nearly_the_same_in_fp32(shared: str, projection: str) -> None:
    core = pair(shared, projection)
    inputs = batch(core.vision), batch(core.text)
    exact = core(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = core(*inputs)
    several = (rough.image, rough.text, *rough.features, *(rough.hidden or ()))
    for mine, other in zip(several, (exact.image, exact.text, *exact.features, *(exact.hidden or ())), strict=True):
        assert mine.dtype == torch.float32
        assert F.cosine_similarity(mine, other).min() > 0.99


@pytest.fixture
def inputs(settings: dict[str, Any]) -> dict[str, Any]:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return {"images": images, "texts": ["a red picture", "paint on all of the paper"]}


def shaken(**options: Any) -> DualEncoder:
    """A model whose trained tensors are no longer those of step 0."""
    model = DualEncoder.build(**options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.core.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@every_pair
def test_what_was_saved_is_what_is_loaded(
    settings: Any, inputs: Any, tmp_path: Any, shared: str, projection: str
) -> None:
    options = settings | {"shared": shared, "projection": projection}
    model = shaken(**options)
    folder = model.save(tmp_path / "x")
    assert set(load_file(folder / "adapter.safetensors")) == set(model.core.trained())
    again = lilt.load(folder)
    assert (again.config.shared, again.config.projection) == (shared, projection)
    fresh = DualEncoder.build(**options).embed(**inputs)
    for side, rows in model.embed(**inputs).items():
        assert torch.equal(rows, again.embed(**inputs)[side])
        assert not torch.equal(rows, fresh[side])


@pytest.mark.parametrize("shared", [specs[-1] for specs in SHARED.values()])
@pytest.mark.parametrize("projection", [specs[-1] for specs in HEADS.values()])
def test_the_seed_alone_says_where_the_heads_start(settings: Any, shared: str, projection: str) -> None:
    def heads(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        core = DualEncoder.build(**settings | {"shared": shared, "projection": projection, "seed": seed}).core
        return {name: p for name, p in core.trained().items() if name.startswith(("shared.", "projection."))}

    one, same, other = heads(4, 1), heads(4, 2), heads(5, 1)
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(p, same[name]) for name, p in one.items())
    assert not one or not all(torch.equal(p, other[name]) for name, p in one.items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TOKENLESS])
def test_encode_is_forward_and_tokens_in_one_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tiny(family)
    inputs = batch(tower)
    expected, apart = tower(inputs), tower.tokens(inputs)
    runs, run = [], tower.run

    def counted(given: Inputs) -> Any:
        runs.append(given)
        return run(given)

    monkeypatch.setattr(tower, "run", counted)
    encoded = tower.encode(inputs, tokens=True)
    assert len(runs) == 1
    assert torch.equal(encoded.pooled, expected) and encoded.hidden is None
    assert encoded.tokens is not None and torch.equal(encoded.tokens.features, apart.features)
    assert encoded.tokens.prefix == apart.prefix
    assert tower.encode(inputs).tokens is None


def test_without_a_reader_of_tokens_the_tower_is_called_as_a_module() -> None:
    core = pair("none", "linear(dim=16)")
    seen = []
    core.vision.register_forward_hook(lambda *_: seen.append("vision"))
    core(batch(core.vision), batch(core.text))
    assert seen == ["vision"]


def test_building_leaves_the_towers_and_the_random_numbers_alone() -> None:
    vision, text = tiny("resnet").train(), tiny("bert").train()
    text.body.embeddings.eval()
    before = {name: buffer.clone() for name, buffer in vision.named_buffers()}
    modes = [module.training for tower in (vision, text) for module in tower.modules()]
    torch.manual_seed(7)
    encoder, _ = build_heads("transformer(pool=mean)", "none", vision, text)
    assert [module.training for tower in (vision, text) for module in tower.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in vision.named_buffers())
    torch.manual_seed(7)  # dropout of the text tower would have drawn
    alone = build_shared("transformer(pool=mean)", vision.dim, text.dim)
    assert all(torch.equal(p, encoder.state_dict()[name]) for name, p in alone.state_dict().items())


@pytest.mark.parametrize("family", ["siglip", "swin", "convnext", "resnet", "own_vision"])
def test_a_tower_without_a_class_token_is_read_by_its_mean(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"the vision tower '.*' has no class token .*use shared=transformer\(pool=mean"
    ):
        joined("transformer", "linear(dim=16)", tiny(family), tiny("bert"), "frozen")
    core = joined("transformer(pool=mean)", "linear(dim=16)", tiny(family), tiny("bert"), "frozen")
    assert core(batch(core.vision), batch(core.text)).image.shape == (3, 16)


@pytest.mark.parametrize("family", TOKENLESS)
@pytest.mark.parametrize(("shared", "projection"), [("transformer", "none"), ("none", "tokens(dim=16)")])
def test_a_tower_without_tokens_is_refused_by_what_reads_them(family: str, shared: str, projection: str) -> None:
    side = "text" if "text" in family else "vision"
    vision, text = (tiny(family), tiny("bert")) if side == "vision" else (tiny("vit"), tiny(family))
    with pytest.raises(ValueError, match=rf"the {side} tower '.*' gives \(1, \d+\) with pool=own, .*use \?pool=cls or"):
        build_heads(shared, projection, vision, text)
    core = joined("mlp", "linear(dim=16)", vision, text, "frozen")
    assert core(batch(core.vision), batch(core.text)).text.shape == (3, 16)


def test_another_pool_of_open_clip_gives_tokens() -> None:
    spec = f"open_clip:{open_clip_arch()}?pretrained=false&pool="
    vision, text = build_tower(f"{spec}cls", "vision"), build_tower(f"{spec}token", "text")
    core = joined("transformer", "none", vision.eval(), text.eval(), "frozen")
    assert core(batch(vision), batch(text)).image.shape == (3, 32)


def both_pools() -> Tower:
    """A vision tower that gives its class token and the mean: twice as wide as its tokens."""
    body = timm_tower("vit_tiny_patch16_224", **VIT).body
    return from_timm(body, "timm:tiny", TowerSpec("timm", pool="cls+mean")).eval()


def test_tokens_of_another_width_than_the_pooled_do_not_go_through_one_mlp() -> None:
    message = r"tokens of width 32 and with pool=cls\+mean features of width 64; expected one width.*shared=transformer"
    with pytest.raises(ValueError, match=message):
        build_heads("mlp", "tokens(dim=16)", both_pools(), tiny("bert"))
    for shared, projection in (("mlp", "none"), ("transformer", "tokens(dim=16)"), ("none", "tokens(dim=16)")):
        core = joined(shared, projection, both_pools(), tiny("bert"), "frozen")
        out = core(batch(core.vision), batch(core.text))
        assert out.image.shape == out.text.shape == (3, {"mlp": 64}.get(shared, 16))


def test_two_widths_need_a_head_or_a_bridge() -> None:
    with pytest.raises(
        ValueError, match=r"projection=none keeps .* 48 \(vision\) and 32 \(text\).*use linear\(dim=256"
    ):
        build_heads("none", "none", wide(), tiny("bert"))
