"""A tuned model merged, disabled and interpolated, with towers from specs and from modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertModel

import lilt
from lilt import DualEncoder, ImageContract
from tests.towers.families import OwnTransformer, Patches

TEXTS = ["a red picture", "blue", "all of it is white paint"]
# adds to weights, changes weights, both, and another policy on each side
MIXED = {"vision_policy": "lora(targets=all)+layernorm", "text_policy": "full"}
POLICIES: list[dict[str, Any]] = [
    {"policy": "lora(targets=q|v)"}, {"policy": "layernorm"}, {"policy": "full"}, {"policy": "lit"}, MIXED,
]  # fmt: skip
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: "+".join(p.values()))


def shaken(**options: Any) -> DualEncoder:
    """A model whose trained tensors are far from where they start."""
    model = DualEncoder.build(**options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.core.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def based(model: DualEncoder, **options: Any) -> DualEncoder:
    """The base towers under the trained heads of a model."""
    base = DualEncoder.build(**(options | {"policy": "frozen", "vision_policy": None, "text_policy": None}))
    base.core.projection.load_state_dict(model.core.projection.state_dict())
    return base


@pytest.fixture
def embed(pictures: Path) -> Callable[[DualEncoder], dict[str, Tensor]]:
    files = sorted(pictures.glob("*.png"))[:4]
    return lambda model: model.embed(files, TEXTS)


def state(model: DualEncoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(t, other[name]) for name, t in one.items())


def close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(rows, other[side], rtol=0, atol=atol) for side, rows in one.items())


@each_policy
def test_merge_gives_the_towers_as_their_libraries_know_them(settings: Any, embed: Any, policy: Any) -> None:
    model = shaken(**settings, **policy)
    before, expected = state(model), embed(model)
    merged = model.merge()
    fresh = DualEncoder.build(**settings, policy="frozen").core
    for body, plain in ((merged.vision, fresh.vision.body), (merged.text, fresh.text.body)):
        assert [(n, type(m)) for n, m in body.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
        assert list(body.state_dict()) == list(plain.state_dict())
        assert not body.training and not any(p.requires_grad for p in body.parameters())
    assert merged.model.core.vision.body is merged.vision and merged.model.core.text.body is merged.text
    assert close(embed(merged.model), expected)
    assert not close(expected, embed(based(model, **settings, **policy)), 1e-3)
    again = merged.model.merge()
    assert same(state(again.model), state(merged.model))
    assert same(state(model), before) and same(embed(model), expected)


def test_merged_modules_load_where_the_library_loads_its_own(settings: Any, tmp_path: Path) -> None:
    merged = shaken(**settings, policy="lora").merge()
    folder = settings["vision"].removeprefix("timm:")
    timm.create_model(f"local-dir:{folder}", num_classes=0).load_state_dict(merged.vision.state_dict())
    assert isinstance(merged.text, BertModel)
    merged.text.save_pretrained(tmp_path / "text")
    plain = BertModel.from_pretrained(tmp_path / "text", add_pooling_layer=False)
    assert same(dict(plain.state_dict()), dict(merged.text.state_dict()))


def test_merged_modules_and_towers_are_built_on_again(settings: Any, embed: Any) -> None:
    model = shaken(**settings, policy="lora")
    merged = model.merge()
    towers = {"vision": merged.model.core.vision, "text": merged.model.core.text}
    second = DualEncoder.build(**(settings | towers), policy="layernorm")
    second.core.projection.load_state_dict(model.core.projection.state_dict())
    assert close(embed(second), embed(model))
    assert {row.rule for row in second.report() if row.trained} == {"layernorm"}
    third = DualEncoder.build(**(settings | {"vision": model.merge().vision}), policy="lora")
    third.core.projection.load_state_dict(model.core.projection.state_dict())
    assert torch.equal(embed(third)["image"], embed(merged.model)["image"])


def test_a_merged_model_that_was_saved_asks_for_its_modules(settings: Any, embed: Any, tmp_path: Path) -> None:
    merged = shaken(**settings, policy="lora", text_policy="frozen").merge()
    folder = merged.model.save(tmp_path / "x")
    with pytest.raises(ValueError, match=r"your own vision module \(module:VisionTransformer\); pass it"):
        lilt.load(folder)
    assert same(embed(lilt.load(folder, vision=merged.vision)), embed(merged.model))


def test_what_does_not_merge_is_named_with_its_tower(settings: Any) -> None:
    model = shaken(**settings, vision_policy="lora", text_policy="layernorm+adapter")
    with pytest.raises(
        ValueError, match=r"^adapter cannot be merged into the text tower 'hf:.*lilt policies.*lilt.load"
    ):
        model.merge()
    with pytest.raises(ValueError, match=r"^deep_adapter cannot be merged into the vision tower 'timm:"):
        shaken(**settings, policy="deep_adapter").merge()


@pytest.mark.parametrize("policy", [*POLICIES, {"policy": "lilt"}, {"policy": "deep_adapter"}], ids=str)
def test_disabled_is_the_base_bit_for_bit_under_the_same_heads(settings: Any, embed: Any, policy: Any) -> None:
    model = shaken(**settings, **policy)
    before, expected = state(model), embed(model)
    pure = embed(based(model, **settings, **policy))
    draw = torch.get_rng_state()
    with model.disabled():
        assert same(embed(model), pure)
        with model.disabled():
            assert same(embed(model), pure)
        assert same(embed(model), pure)
    assert torch.equal(torch.get_rng_state(), draw)
    assert same(state(model), before) and same(embed(model), expected)
    assert not close(expected, pure, 1e-3)


def test_the_end_of_an_inner_block_does_not_end_the_outer_one(settings: Any, embed: Any, tmp_path: Path) -> None:
    # torch's attention reads its weight functionally, so the update is inside it
    options = settings | {"vision": OwnTransformer(Patches()), "preprocess": ImageContract(32)}
    model = shaken(**options, policy="lora")
    expected = embed(model)
    with model.disabled():
        pure = embed(model)
        with model.disabled():
            pass
        assert same(embed(model), pure)
        with pytest.raises(ValueError, match=r"inside disabled\(\)"):
            model.save(tmp_path / "x")
    assert same(embed(model), expected) and not close(expected, pure, 1e-3)


@pytest.mark.parametrize("policy", ["layernorm", "lilt"])
@pytest.mark.parametrize("inner", [False, True])
def test_an_error_inside_disabled_brings_the_tuned_model_back(
    settings: Any, embed: Any, policy: str, inner: bool
) -> None:
    model = shaken(**settings, policy=policy)
    before, expected = state(model), embed(model)
    with pytest.raises(KeyError, match="stop"), model.disabled():
        if inner:
            with model.disabled():
                raise KeyError("stop")
        raise KeyError("stop")
    assert same(state(model), before) and same(embed(model), expected)
    assert same(state(model.interpolate(1)), before)  # which is refused inside


@pytest.mark.parametrize("training", [True, False])
def test_disabled_leaves_modes_and_gradients_alone(settings: Any, training: bool) -> None:
    model = shaken(**settings, policy="layernorm+lora").train(training)
    model.encode_text(TEXTS).sum().backward()
    modes = [module.training for module in model.modules()]
    grads = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    with model.disabled():
        assert [module.training for module in model.modules()] == modes
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert p.grad is None or grad is None or torch.equal(p.grad, grad)


def test_a_graph_from_before_goes_backward_after_disabled(settings: Any) -> None:
    models = [shaken(**settings, policy="layernorm") for _ in range(2)]
    losses = [model.encode_text(TEXTS)[:, 0].sum() for model in models]
    with models[0].disabled(), torch.no_grad():
        models[0].encode_text(TEXTS)
    for loss in losses:
        loss.backward()
    for one, other in zip(*(m.core.text.parameters() for m in models), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad)


def test_the_base_is_built_at_the_size_of_the_tower(settings: Any, embed: Any) -> None:
    options = settings | {"image_px": 48}
    model = shaken(**options, policy="layernorm")
    with model.disabled():
        assert same(embed(model), embed(based(model, **options)))


def test_nothing_is_saved_merged_or_interpolated_inside_disabled(settings: Any, tmp_path: Path) -> None:
    model = shaken(**settings, policy="layernorm")
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: model.save(tmp_path / "x"), "merge": model.merge, "interpolate": lambda: model.interpolate(0.5)
    }  # fmt: skip
    with model.disabled():
        for name, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{name} inside disabled\(\) would take the base .*leave the block"):
                call()
    assert not (tmp_path / "x").exists()
    for call in calls.values():
        call()


def test_base_weights_that_changed_on_disk_are_noticed(settings: Any, tmp_path: Path) -> None:
    shutil.copytree(settings["text"].removeprefix("hf:"), tmp_path / "base")
    model = shaken(**(settings | {"text": f"hf:{tmp_path / 'base'}"}), policy="layernorm")
    before = state(model)
    other = BertModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.embeddings.LayerNorm.bias.add_(1)
    other.save_pretrained(tmp_path / "base")
    message = r"the base of the text tower 'hf:.*' has other weights .*\(fingerprint \w{12}, expected \w{12}\); restore"
    with pytest.raises(ValueError, match=message), model.disabled():
        pytest.fail("the block was entered")
    with pytest.raises(ValueError, match=message):
        model.interpolate(0.5)
    assert same(state(model), before)


class Eye(nn.Module):
    """Somebody's own encoder: patches, two blocks, tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden


def eye(seed: int = 3) -> Eye:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Eye()


def test_a_tower_from_a_module_takes_its_base_as_an_argument(settings: Any, embed: Any) -> None:
    inputs = {"preprocess": ImageContract(32)}
    options = settings | {"vision": eye(), **inputs}
    model = shaken(**options, policy="layernorm")
    before, expected, base = state(model), embed(model), eye()
    with pytest.raises(ValueError, match=r"layernorm changed weights of the vision tower, .*module:Eye.*vision=module"):
        model.interpolate(0.5)
    with model.disabled(vision=base, **inputs):
        assert same(embed(model), embed(based(model, **(settings | {"vision": eye(), **inputs}))))
    assert same(dict(base.state_dict()), dict(eye().state_dict())) and base.training
    assert same(state(model), before) and same(embed(model), expected)
    with pytest.raises(ValueError, match="the base of the vision tower 'module:Eye' has other weights"):
        model.interpolate(0.5, vision=eye(seed=4), **inputs)
    assert close(embed(model.interpolate(1, vision=base, **inputs)), expected, 0)


def test_the_module_given_as_base_keeps_what_a_tower_drops(settings: Any, embed: Any) -> None:
    def vit() -> Any:
        folder = settings["vision"].removeprefix("timm:")
        return timm.create_model(f"local-dir:{folder}", pretrained=True).half()

    model, base = shaken(**(settings | {"vision": vit()}), policy="layernorm"), vit()
    with model.disabled(vision=base):
        assert same(embed(model), embed(based(model, **(settings | {"vision": vit()}))))
    assert same(base.state_dict(), vit().state_dict()) and base.head.weight.dtype == torch.float16


def test_what_only_adds_needs_no_base(settings: Any, embed: Any) -> None:
    options = settings | {"vision": eye(), "preprocess": ImageContract(32), "text_policy": "layernorm"}
    model = shaken(**options, vision_policy="lora(targets=mlp)")
    with model.disabled():
        pure = embed(model)
    assert same(pure, embed(based(model, **(options | {"vision": eye()}))))


@pytest.mark.parametrize("policy", [*POLICIES, {"policy": "lilt"}, {"policy": "deep_adapter"}], ids=str)
def test_interpolation_goes_from_the_base_to_the_tuned_model(settings: Any, embed: Any, policy: Any) -> None:
    model = shaken(**settings, **policy)
    before, expected = state(model), embed(model)
    assert same(state(model.interpolate(1)), before)
    assert close(embed(model.interpolate(0)), embed(based(model, **settings, **policy)), 1e-6)
    half = model.interpolate(0.5)
    assert not close(embed(half), expected, 1e-3)
    assert same(dict(half.core.projection.state_dict()), dict(model.core.projection.state_dict()))
    assert same(state(model), before) and same(embed(model), expected)
    assert half.config == model.config and set(half.core.trained()) == set(model.core.trained())


@pytest.mark.parametrize("scale", [-0.1, 1.01, float("nan")])
def test_beyond_the_ends_is_an_error(settings: Any, scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale=.* is outside the way from base to tuned; expected 0 to 1"):
        shaken(**settings).interpolate(scale)
