"""An image that cannot be read becomes a row that is not valid; it is named, and the other rows never notice."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lilt.build import build_model, build_pairs
from lilt.config import TrainConfig
from lilt.data import Batch, Collate, Pairs, Sample, eval_transform, open_image, pack, read_image
from lilt.model import TwoTower
from lilt.towers import ImageContract
from lilt.train.learner import Learner
from lilt.train.step import Objective


def damage(kind: str, good: Path, folder: Path) -> Path:
    file = folder / f"{kind}{good.suffix}"
    content = good.read_bytes()
    made = {
        "missing": None,
        "empty": b"",
        "text": b"<html>not found</html>",
        "truncated": content[: len(content) // 2],
        "header": content[:30],
        "flipped": content[:60] + bytes(255 - b for b in content[60:]),
    }[kind]
    if made is not None:
        file.write_bytes(made)
    return file


@pytest.mark.parametrize("source", ["red0.png", "red1.jpg"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "header"])
def test_a_damaged_image_is_none_and_says_why(pictures: Path, tmp_path: Path, kind: str, source: str) -> None:
    file = damage(kind, pictures / source, tmp_path)
    image, fault = read_image(str(file), eval_transform(ImageContract(16)))
    assert image is None
    assert fault is not None
    assert fault[0] == str(file)
    assert ": " in fault[1]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of a damaged TIFF
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_no_damage_whatever_stops_the_reader(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"x.{ending}"
    Image.effect_mandelbrot((33, 21), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(file)
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(4)
    for _ in range(60):
        broken = bytearray(content)
        for place in torch.randint(min(len(content), 200), (4,), generator=generator).tolist():
            broken[place] ^= 0x5A
        file.write_bytes(broken)
        image, fault = read_image(str(file), eval_transform(ImageContract(16)))
        assert (image is None) != (fault is None)


def broken_exif(tag: int) -> bytes:
    """A picture on its side, whose EXIF has one byte wrong: a description goes by the number of another tag."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "of a boat"
    made = BytesIO()
    Image.new("RGB", (8, 6)).save(made, "JPEG", exif=exif)
    content = bytearray(made.getvalue())
    content[content.index(bytes.fromhex("010e0002")) + 1] = tag
    return bytes(content)


def odd_dds() -> bytes:
    made = BytesIO()
    Image.new("RGB", (8, 6)).save(made, "DDS")
    content = bytearray(made.getvalue())
    content[80:84] = bytes(4)  # says of no known kind of pixels
    return bytes(content)


def test_an_unusual_error_of_pillow_is_a_fault_too(tmp_path: Path) -> None:
    file = tmp_path / "odd.jpg"
    file.write_bytes(odd_dds())
    image, fault = read_image(str(file), eval_transform(ImageContract(16)))
    assert image is None
    assert fault is not None
    assert fault[0] == str(file)
    assert fault[1].startswith("NotImplementedError: ")
    Image.new("RGB", (8, 6)).save(tmp_path / "good.png")
    samples = [Sample(tmp_path / name, ("a boat",), "train") for name in ("odd.jpg", "good.png")]
    packed = pack(samples, tmp_path / "shards", image_px=4)
    assert [name for name, _ in packed.bad] == [str(file)]


def test_no_place_in_memory_is_no_fault_of_a_picture(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        read_image(str(pictures / "red0.png"), eval_transform(ImageContract(16)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Image.new(mode, (9, 6)).save(file)
    picture = open_image(file)
    assert (picture.mode, picture.size) == ("RGB", (9, 6))


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_photograph_is_turned_upright_as_pillow_does_it(tmp_path: Path, orientation: int, ending: str) -> None:
    picture = Image.effect_noise((20, 10), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation  # how the camera was held
    picture.save(tmp_path / f"x.{ending}", exif=exif, lossless=True)
    with Image.open(tmp_path / f"x.{ending}") as image:
        assert open_image(tmp_path / f"x.{ending}").tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()


@pytest.mark.parametrize("tag", [0, 26])
def test_a_wrong_byte_in_exif_costs_no_picture(tmp_path: Path, tag: int) -> None:
    (tmp_path / "x.jpg").write_bytes(broken_exif(tag))
    assert open_image(tmp_path / "x.jpg").size == (6, 8)  # what says how the camera was held is whole


@pytest.fixture
def parts(settings: dict[str, Any], pictures: Path, tmp_path: Path) -> tuple[TwoTower, Pairs, Collate]:
    """Two colours twice and a broken picture that shares its caption with the first."""
    files = [pictures / "red0.png", pictures / "blue0.png", pictures / "red0.png", tmp_path / "broken.png"]
    (tmp_path / "broken.png").write_bytes((pictures / "red0.png").read_bytes()[:70])
    captions = ["a red picture", "blue paint", "all of it is red", "a red picture"]
    samples = [Sample(f, (c,), "train") for f, c in zip(files, captions, strict=True)]
    config = TrainConfig(**settings, augment="none", policy="layernorm")
    torch.manual_seed(0)
    model = build_model(config)
    return model, *build_pairs(config, model, samples)


def loss_and_gradients(model: TwoTower, batch: Batch, same: str) -> list[Tensor]:
    loss, _ = Objective(same=same)(Learner(model)(batch.images, batch.tokens), batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.trained().values()))]


@pytest.mark.parametrize("same", ["positive", "ignored", "negative"])
def test_a_broken_image_changes_neither_loss_nor_gradient_of_the_others(
    parts: tuple[TwoTower, Pairs, Collate], tmp_path: Path, same: str
) -> None:
    model, dataset, collate = parts
    model.eval()
    whole = collate([dataset[0, i] for i in range(4)])
    assert whole.valid.tolist() == [True, True, True, False]
    assert [path for path, _ in whole.faults] == [str(tmp_path / "broken.png")]
    assert not whole.images[3].any()
    less = collate([dataset[0, i] for i in range(3)])
    for one, other in zip(*(loss_and_gradients(model, b, same) for b in (whole, less)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_of_broken_images_alone_has_no_gradient(parts: tuple[TwoTower, Pairs, Collate]) -> None:
    model, dataset, collate = parts
    assert all(not value.any() for value in loss_and_gradients(model, collate([dataset[0, 3]] * 2), "positive"))
