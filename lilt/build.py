"""From settings to objects; the only factory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lilt import demo
from lilt.config import ModelConfig, TrainConfig
from lilt.data import Collate, PairDataset, Sample, read_manifest, read_references, select, train_transform
from lilt.model import Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.policies.peft import written_out
from lilt.towers import ImageContract, Tokenizer, build_tower, expand
from lilt.towers.loading import fixed_seed

T = TypeVar("T", bound=ModelConfig)

# names for manifests: an ordinary set, written on first use
DATA = {"demo": demo.manifest}


def settled(config: T) -> T:
    """Return settings whose policies say the same when the files they were read from are gone."""
    specs = {name: getattr(config, name) for name in ("policy", "vision_policy", "text_policy")}
    changes: dict[str, Any] = {name: written_out(spec) for name, spec in specs.items() if spec}
    return replace(config, **changes)


def build_model(
    config: ModelConfig,
    vision: nn.Module | None = None,
    text: nn.Module | None = None,
    preprocess: Any = None,
    tokenizer: Any = None,
) -> TwoTower:
    """Build the towers, apply their policies and put the heads on; modules stand in for specs where given."""
    vision_policy = parse_policy(config.vision_policy or config.policy, "vision")
    text_policy = parse_policy(config.text_policy or config.policy, "text")
    image = build_tower(
        config.vision if vision is None else vision, "vision", preprocess, config.image_px, config.vision_roles
    )
    language = build_tower(config.text if text is None else text, "text", tokenizer, roles=config.text_roles)
    # both plans are made before either tower is changed
    plans = plan(vision_policy, image), plan(text_policy, language)
    with fixed_seed(config.seed):
        for joint, tower in zip(plans, (image, language), strict=True):
            apply(joint, tower)
        projection = build_projection(config.projection, image.dim, language.dim)
    return TwoTower(image, language, projection, Scale(config.scale, config.scale_min, config.scale_max))


@dataclass(frozen=True)
class Splits:
    """The samples of each part (validation and test may be empty), and numbers to read the test result against."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    references: dict[str, float]


def manifest_path(data: str) -> Path:
    """Return the manifest of a path, or of a named set, which is written on first use."""
    return DATA[data]() if data in DATA else Path(expand(data))


def read_split(data: str, split: str, image_root: str | None = None) -> list[Sample]:
    """Read one split of a manifest or a named set."""
    return select(read_manifest(manifest_path(data), _root(image_root)), split, data)


def build_splits(config: TrainConfig) -> Splits:
    """Read the three splits of a training run; `none` is empty."""
    path = manifest_path(config.data)
    samples = read_manifest(path, _root(config.image_root))
    train, val, test = (
        [] if split == "none" else select(samples, split, config.data)
        for split in (config.train_split, config.val_split, config.test_split)
    )
    if not train:
        raise ValueError("train_split=none leaves nothing to train on; name a split of the manifest")
    if config.max_images is not None and config.max_images < len(train):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
        train = [train[i] for i in sorted(order[: config.max_images].tolist())]
    return Splits(train, val, test, read_references(path, config.test_split))


def _root(image_root: str | None) -> str | None:
    return expand(image_root) if image_root else None


def build_pairs(config: TrainConfig, model: TwoTower, samples: list[Sample]) -> tuple[PairDataset, Collate]:
    """Return the training pairs as both towers want them, and what makes batches of them."""
    image, language = _contracts(model)
    dataset = PairDataset(
        samples,
        language,
        train_transform(image, config.augment),
        max_tokens=config.train_tokens,
        captions=config.captions,
        seed=config.seed,
    )
    return dataset, Collate(language, tuple(model.vision.example().shape[1:]))  # type: ignore[union-attr]


def _contracts(model: TwoTower) -> tuple[ImageContract, Tokenizer]:
    image, language = model.vision.contract, model.text.contract
    assert isinstance(image, ImageContract)
    assert not isinstance(language, ImageContract)
    return image, language
