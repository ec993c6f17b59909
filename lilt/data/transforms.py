"""From a picture to the tensor a vision tower wants, with or without augmentation (torchvision v2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lilt.registry import Registry, construct, parse_call, split_top
from lilt.towers.base import ImageContract

Transform = Callable[[Image.Image], Tensor]
THIN = 16  # times as long as wide: from here on
augmentations: Registry[Callable[..., v2.Transform]] = Registry("augmentation")


class Rot90(v2.Transform):  # type: ignore[misc]
    """Turn the picture by a random multiple of 90 degrees."""

    def forward(self, *inputs: Any) -> Any:
        turns = int(torch.randint(4, ()))
        out = [v2.functional.rotate(x, 90.0 * turns) if turns else x for x in inputs]
        return out[0] if len(out) == 1 else tuple(out)


class Middle(v2.Transform):  # type: ignore[misc]
    """Resize the shorter side to `side` and take the middle, px by px."""

    def __init__(self, side: int, px: int, mode: InterpolationMode):
        super().__init__()
        self.side, self.px, self.mode = side, px, mode
        self.resize, self.crop = v2.Resize(side, interpolation=mode, antialias=True), v2.CenterCrop(px)

    def forward(self, picture: Image.Image) -> Image.Image:
        """Return the middle; of a thin picture only that is resized, since 1 by 8000 would become gigabytes."""
        short, long = sorted(picture.size)
        resized = self._strip(picture, short, long) if long > THIN * short else self.resize(picture)
        made: Image.Image = self.crop(resized)
        return made

    def _strip(self, picture: Image.Image, short: int, long: int) -> Image.Image:
        """Return what the resized picture would have in the middle of its longer side, px of them."""
        length = int(self.side * long / short)  # as torchvision rounds it
        start = round((length - self.px) / 2)
        # Pillow reads beyond the box what its filter needs, so this is a part of the whole and no picture of its own
        low, high = (at * long / length for at in (start, start + self.px))
        wide = picture.width > picture.height
        box = (low, 0.0, high, float(short)) if wide else (0.0, low, float(short), high)
        size = (self.px, self.side) if wide else (self.side, self.px)
        return picture.resize(size, Image.Resampling[self.mode.name], box)


def crop(px: int, mode: InterpolationMode, low: float = 0.5, high: float = 1.0) -> v2.Transform:
    """Take a random crop of low to high of the area, resized to px."""
    return v2.RandomResizedCrop(px, scale=(low, high), interpolation=mode, antialias=True)


def hflip(px: int, mode: InterpolationMode) -> v2.Transform:
    """Mirror left and right; not for captions that speak of direction."""
    return v2.RandomHorizontalFlip()


def vflip(px: int, mode: InterpolationMode) -> v2.Transform:
    """Mirror up and down; for views from above."""
    return v2.RandomVerticalFlip()


def rot90(px: int, mode: InterpolationMode) -> v2.Transform:
    """Turn by a multiple of 90 degrees; for views from above."""
    return Rot90()


def randaugment(px: int, mode: InterpolationMode, n: int = 2, m: int = 7) -> v2.Transform:
    """Apply n random operations of strength m (0 to 30)."""
    return v2.RandAugment(num_ops=n, magnitude=m, interpolation=InterpolationMode.BILINEAR)


def jitter(px: int, mode: InterpolationMode, strength: float = 0.2) -> v2.Transform:
    """Change brightness, contrast and saturation by up to strength."""
    return v2.ColorJitter(strength, strength, strength)


for _part in (crop, hflip, vflip, rot90, randaugment, jitter):
    augmentations.register(_part.__name__)(_part)


def eval_transform(contract: ImageContract) -> Transform:
    """Return resize, centre crop and normalisation as the tower wants them."""
    if contract.transform is not None:
        return contract.transform
    px, mode = contract.image_px, InterpolationMode(contract.interpolation)
    return v2.Compose([Middle(round(px / contract.crop), px, mode), *_to_tensor(contract)])


def train_transform(contract: ImageContract, augment: str) -> Transform:
    """Return the transform of `crop(0.2,1)+hflip+randaugment(2,7)`; `none` is the one of evaluation."""
    if augment == "none":
        return eval_transform(contract)
    if contract.transform is not None:
        raise ValueError(
            f"augment={augment!r} needs to know the tower's normalisation, and its preprocess is a plain callable; "
            "pass lilt.ImageContract(image_px=…, mean=…, std=…) instead, or augment=none"
        )
    px, mode = contract.image_px, InterpolationMode(contract.interpolation)
    calls = [parse_call(part) for part in split_top(augment, "+")]
    steps = []
    for call in calls:
        make = augmentations[call.name]
        fields = {
            k: p.annotation
            for k, p in inspect.signature(make, eval_str=True).parameters.items()
            if k not in ("px", "mode")
        }
        steps.append(construct(lambda make=make, **options: make(px, mode, **options), call, fields))
    if not any(call.name == "crop" for call in calls):
        steps.append(Middle(px, px, mode))
    return v2.Compose([*steps, *_to_tensor(contract)])


def _to_tensor(contract: ImageContract) -> list[v2.Transform]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(contract.mean), std=list(contract.std)),
    ]
