"""Every registered augmentation changes the picture and keeps its shape; evaluation is what the tower wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lilt.data import eval_transform, train_transform
from lilt.data.transforms import THIN, augmentations
from lilt.towers import ImageContract

CONTRACT = ImageContract(24, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0), "bilinear", crop=0.75)


def picture(width: int = 40, height: int = 32) -> Image.Image:
    """A colour gradient with a bright corner: no mirror image or turn of it is itself."""
    made = Image.new("RGB", (width, height))
    made.putdata([(4 * x, 5 * y, 60 + x + y) for y in range(height) for x in range(width)])
    made.paste((250, 240, 20), (0, 0, 14, 9))
    return made


def draws(augment: str, count: int = 12) -> list[Tensor]:
    transform = train_transform(CONTRACT, augment)
    torch.manual_seed(0)
    return [transform(picture()) for _ in range(count)]


@pytest.mark.parametrize("name", augmentations.names())
def test_an_augmentation_changes_the_picture_and_keeps_the_shape(name: str) -> None:
    images = draws(name)
    assert all(i.shape == (3, 24, 24) and i.dtype == torch.float32 and i.isfinite().all() for i in images)
    assert any(not torch.equal(images[0], other) for other in images[1:])


@pytest.mark.parametrize("name", augmentations.names())
def test_the_torch_generator_alone_decides(name: str) -> None:
    assert all(torch.equal(one, other) for one, other in zip(draws(name), draws(name), strict=True))


@pytest.mark.parametrize(("name", "dims"), [("hflip", [2]), ("vflip", [1])])
def test_a_mirror_is_the_picture_or_its_mirror_image(name: str, dims: list[int]) -> None:
    transform = train_transform(ImageContract(24), name)
    torch.manual_seed(1)
    seen = [transform(picture(24, 24)) for _ in range(8)]
    plain = eval_transform(ImageContract(24))(picture(24, 24))
    assert {torch.equal(i, plain) for i in seen} == {True, False}
    assert all(torch.equal(i, plain) or torch.equal(i, plain.flip(dims)) for i in seen)


def test_quarter_turns_are_the_four() -> None:
    transform = train_transform(ImageContract(24), "rot90")
    torch.manual_seed(0)
    plain = eval_transform(ImageContract(24))(picture(24, 24))
    turned = [torch.rot90(plain, k, (1, 2)) for k in range(4)]
    seen = [transform(picture(24, 24)) for _ in range(30)]
    assert {next(k for k in range(4) if torch.equal(turned[k], image)) for image in seen} == {0, 1, 2, 3}


def test_options_reach_the_augmentation() -> None:
    assert torch.equal(*draws("jitter(strength=0)", 2))
    assert not torch.equal(*draws("jitter(strength=0.9)", 2))
    with pytest.raises(ValueError, match="randaugment has no option 'k'; it takes: n, m"):
        train_transform(CONTRACT, "randaugment(k=2)")


def test_an_unknown_augmentation_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"unknown augmentation 'hflp'; known: crop, hflip.*Did you mean 'hflip'\?"):
        train_transform(CONTRACT, "crop(0.5,1)+hflp")


def test_none_is_the_transform_of_evaluation() -> None:
    assert torch.equal(draws("none", 1)[0], eval_transform(CONTRACT)(picture()))


@pytest.mark.parametrize("size", [(40, 32), (32, 40), (8, 50), (24, 24)])
def test_evaluation_keeps_the_middle_at_the_towers_size(size: tuple[int, int]) -> None:
    image = eval_transform(CONTRACT)(picture(*size))
    assert image.shape == (3, 24, 24)


def resized_and_cut(image: Image.Image, mode: str, side: int, px: int) -> Tensor:
    """The whole picture resized, then its middle."""
    resize = v2.Resize(side, interpolation=InterpolationMode(mode), antialias=True)
    return v2.functional.pil_to_tensor(v2.CenterCrop(px)(resize(image)))


def middle(image: Image.Image, mode: str, side: int, px: int, augment: str = "none") -> Tensor:
    plain = ImageContract(px, (0.0,) * 3, (1.0,) * 3, mode, crop=px / side)
    return (train_transform(plain, augment)(image) * 255).round().to(torch.uint8)


def waves(width: int, height: int) -> Image.Image:
    """Slow waves over the longer side and a slope over the shorter one, other ones in each colour."""
    x, y = torch.arange(width)[None].double(), torch.arange(height)[:, None].double()
    short = min(width, height)
    colours = [120 + 60 * torch.sin((x + y) / short / k) + 20 * (x.sub(y) / short).cos() for k in (1.0, 2.0, 3.0)]
    return v2.functional.to_pil_image(torch.stack(colours).round().to(torch.uint8))


modes = pytest.mark.parametrize("mode", ["bicubic", "bilinear", "lanczos", "nearest"])
sides = pytest.mark.parametrize(("side", "px"), [(24, 24), (32, 24), (23, 24), (37, 31)])


@modes
@sides
@pytest.mark.parametrize("size", [(1, 1), (1, THIN), (20, 33), (57, 20), (5, 5 * THIN), (7 * THIN, 7), (300, 199)])
def test_up_to_a_bound_the_whole_picture_is_resized(size: tuple[int, int], mode: str, side: int, px: int) -> None:
    noise = torch.randint(256, (3, size[1], size[0]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = v2.functional.to_pil_image(noise)
    assert torch.equal(middle(image, mode, side, px), resized_and_cut(image, mode, side, px))


@modes
@sides
@pytest.mark.parametrize("size", [(6, 6 * THIN + 1), (8, 700), (900, 9), (31, 2000), (5001, 300)])
def test_of_a_thin_picture_the_same_comes_out(size: tuple[int, int], mode: str, side: int, px: int) -> None:
    image = waves(*size)
    found, expected = middle(image, mode, side, px).int(), resized_and_cut(image, mode, side, px).int()
    assert expected.float().std() > 4
    # a pixel on the border between two may come from either
    off = (found - expected).abs().max()
    assert off <= (2 if mode != "nearest" else 30), off
    assert (found != expected).float().mean() < (0.5 if mode != "nearest" else 0.05)


@pytest.mark.parametrize("augment", ["none", "hflip", "randaugment(2,7)+hflip", "crop(0.2,1)", "rot90+jitter"])
@pytest.mark.parametrize("size", [(1, 8000), (30_000, 2)])
def test_a_thin_picture_takes_no_gigabytes(
    size: tuple[int, int], augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[int] = []
    resize = Image.Image.resize

    def watch(self: Image.Image, wanted: tuple[int, int], *more: Any, **named: Any) -> Image.Image:
        largest.append(wanted[0] * wanted[1])
        return resize(self, wanted, *more, **named)

    monkeypatch.setattr(Image.Image, "resize", watch)
    transform = train_transform(ImageContract(224, crop=0.9), augment)
    assert transform(Image.new("RGB", size, (9, 99, 199))).shape == (3, 224, 224)
    assert max(largest) <= 249 * 249


def test_evaluation_normalises_as_the_tower_does() -> None:
    image = eval_transform(CONTRACT)(Image.new("RGB", (50, 50), (51, 102, 204)))
    expected = torch.tensor([(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 1.0])
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 24, 24))


def test_an_own_callable_is_used_as_it_is_and_cannot_be_augmented() -> None:
    contract = ImageContract(0, transform=lambda picture: torch.full((3, 2, 2), 7.0))
    assert torch.equal(eval_transform(contract)(picture()), torch.full((3, 2, 2), 7.0))
    assert train_transform(contract, "none") is contract.transform
    with pytest.raises(ValueError, match=r"augment='hflip' needs to know .*pass lilt.ImageContract\(.*or augment=none"):
        train_transform(contract, "hflip")
