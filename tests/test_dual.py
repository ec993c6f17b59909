"""The facade: three ways to give an image, modes left alone, towers from specs, modules and factories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lilt
from lilt import DualEncoder, ImageContract
from lilt.data import eval_transform, open_image
from tests.conftest import word_tokenizer

TEXTS = ["a red picture", "blue", "all of it is white paint"]


@pytest.fixture
def model(settings: dict[str, Any]) -> DualEncoder:
    return DualEncoder.build(**settings, policy="layernorm")


@pytest.fixture
def files(pictures: Path) -> list[Path]:
    return sorted(pictures.glob("*.png"))[:5]


def test_tensors_pictures_and_paths_agree(model: DualEncoder, files: list[Path]) -> None:
    contract = model.core.vision.contract
    assert isinstance(contract, ImageContract)
    by_path = model.encode_image(files)
    ready = torch.stack([eval_transform(contract)(open_image(f)) for f in files])
    assert torch.equal(model.encode_image(ready), by_path)
    assert torch.equal(model.encode_image([Image.open(f) for f in files]), by_path)
    assert torch.equal(model.encode_image([str(f) for f in files]), by_path)
    torch.testing.assert_close(model.encode_image(files[2]), by_path[2:3], rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_a_picture_of_any_mode_is_taken_as_rgb(model: DualEncoder) -> None:
    grey = Image.new("L", (30, 40), 90)
    assert torch.equal(model.encode_image([grey]), model.encode_image([grey.convert("RGB")]))


def test_encoding_can_be_differentiated(model: DualEncoder, files: list[Path]) -> None:
    score = (model.encode_image(files[:3]) * model.encode_text(TEXTS)).sum()
    score.backward()
    for name, parameter in model.core.trained().items():
        assert (parameter.grad is not None) == (name != "scale.log"), name
        if parameter.grad is not None and "bias" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_a_tensor_gets_its_gradient(model: DualEncoder) -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    model.encode_image(images)[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_encoding_leaves_the_mode_alone(model: DualEncoder, files: list[Path], training: bool) -> None:
    model.train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    one, other = model.encode_text(TEXTS), model.encode_text(TEXTS)
    model.encode_image(files)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(one, other) != training  # BERT's dropout


@pytest.mark.parametrize("training", [True, False])
def test_embed_works_in_eval_mode_and_restores_the_mode(model: DualEncoder, files: list[Path], training: bool) -> None:
    calm = model.embed(images=files, texts=TEXTS)
    model.train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    again = model.embed(images=files, texts=TEXTS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(calm[side], again[side]) for side in calm | again)
    assert not any(rows.requires_grad for rows in again.values())


def test_a_built_model_is_in_eval_mode_and_stays_there(model: DualEncoder, files: list[Path]) -> None:
    assert not any(module.training for module in model.modules())
    model.embed(texts=TEXTS)
    assert not any(module.training for module in model.modules())


def test_embed_restores_the_mode_after_an_error(model: DualEncoder, tmp_path: Path) -> None:
    model.train()
    with pytest.raises(FileNotFoundError):
        model.embed(images=[tmp_path / "missing.png"])
    assert model.training
    assert model.core.text.training


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_embed_gives_unit_rows_whatever_the_batch(model: DualEncoder, files: list[Path], batch_size: int) -> None:
    whole, out = (model.embed(images=files, texts=TEXTS, batch_size=n) for n in (64, batch_size))
    assert (out["image"].shape, out["text"].shape) == ((5, 16), (3, 16))
    for side, rows in out.items():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
        torch.testing.assert_close(rows, whole[side], rtol=0, atol=1e-5)


def test_embed_takes_one_side_and_empty_lists(model: DualEncoder) -> None:
    assert model.embed(texts=TEXTS).keys() == {"text"}
    assert model.embed(images=[], texts=[])["image"].shape == (0, 16)
    assert model.embed(images=torch.rand(3, 3, 32, 32), batch_size=2)["image"].shape == (3, 16)


class Eye(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden


class Tongue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        return self.norm(self.words(input_ids))


def seeded(cls: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return cls()


def eye() -> tuple[nn.Module, ImageContract]:
    return Eye(), ImageContract(16, interpolation="bilinear")


def tongue() -> tuple[nn.Module, object]:
    return Tongue(), word_tokenizer()


def test_own_modules_make_the_round_trip(files: list[Path], tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"preprocess": ImageContract(16), "tokenizer": word_tokenizer()}
    model = DualEncoder.build(seeded(Eye), seeded(Tongue), "layernorm", projection="linear(dim=6)", **inputs)
    with torch.no_grad():
        model.core.text.body.norm.bias.add_(torch.linspace(-1, 1, 12))
    folder = model.save(tmp_path / "x")
    again = lilt.load(folder, vision=seeded(Eye), text=seeded(Tongue), **inputs)
    for side, rows in model.embed(files, TEXTS).items():
        assert torch.equal(rows, again.embed(files, TEXTS)[side])
    with pytest.raises(ValueError, match=r"was trained on your own vision module \(module:Eye\); pass it: lilt.load"):
        lilt.load(folder)
    with pytest.raises(ValueError, match="the text tower 'module:Tongue' has other base weights than the checkpoint"):
        lilt.load(folder, vision=seeded(Eye), text=Tongue(), **inputs)


def test_factories_make_the_round_trip(files: list[Path], tmp_path: Path) -> None:
    model = DualEncoder.build("py:tests.test_dual:eye", "py:tests.test_dual:tongue", projection="linear(dim=6)")
    again = lilt.load(model.save(tmp_path / "x"))
    for side, rows in model.embed(files, TEXTS).items():
        assert rows.shape[1] == 6
        assert torch.equal(rows, again.embed(files, TEXTS)[side])


def test_a_module_without_its_input_is_an_error(tiny_text: str) -> None:
    with pytest.raises(ValueError, match=r"the module Eye came without a preprocess; .*lilt.ImageContract\("):
        DualEncoder.build(Eye(), tiny_text)


def test_the_same_seed_builds_the_same_heads(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    one = DualEncoder.build(**settings, seed=4)
    torch.manual_seed(2)
    same, other = DualEncoder.build(**settings, seed=4), DualEncoder.build(**settings, seed=5)
    weights = [m.core.projection.vision.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
