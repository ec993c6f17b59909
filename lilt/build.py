"""From settings to objects; the only factory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lilt import demo, distributed
from lilt.config import ModelConfig, TrainConfig
from lilt.data import (
    Collate,
    PairDataset,
    Pairs,
    Sample,
    ShardDataset,
    ShardSet,
    index_of,
    is_shards,
    is_table,
    read_manifest,
    read_references,
    read_table,
    select,
    shard_paths,
    train_transform,
)
from lilt.losses import build_loss
from lilt.model import Scale, Teacher, TwoTower, build_heads, build_projection, build_teacher
from lilt.policies import apply, parse_policy, plan
from lilt.policies.peft import written_out
from lilt.towers import ImageContract, Tokenizer, build_tower, expand, load_baseline
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
    policies = {side: parse_policy(spec, side) for side, spec in config.policies.items()}
    image = build_tower(
        config.vision if vision is None else vision, "vision", preprocess, config.image_px, config.vision_roles
    )
    language = build_tower(config.text if text is None else text, "text", tokenizer, roles=config.text_roles)
    # both plans are made before either tower is changed
    plans = plan(policies["vision"], image), plan(policies["text"], language)
    with fixed_seed(config.seed):
        for joint, tower in zip(plans, (image, language), strict=True):
            apply(joint, tower)
        shared, projection = build_heads(config.shared, config.projection, image, language)
    loss = build_loss(config.loss)
    start = config.scale or loss.scale_start or 1.0
    scale = Scale(start, config.scale_min, config.scale_max, learned=loss.needs_scale)
    return TwoTower(image, language, projection, scale, shared, loss.bias_start)


def build_baseline(what: str) -> tuple[TwoTower, ModelConfig]:
    """Build a model that comes with both sides (`open_clip:ARCH@TAG`, `hf:NAME`) as it is; settings that describe it.

    Its own projections are the last part of its towers.
    """
    found = load_baseline(what)
    low, high = min(ModelConfig.scale_min, found.scale), max(ModelConfig.scale_max, found.scale)
    for tower in (found.vision, found.text):
        apply(plan(parse_policy("frozen", tower.side), tower), tower)
    projection = build_projection("none", found.vision.dim, found.text.dim)
    core = TwoTower(found.vision, found.text, projection, Scale(found.scale, low, high), bias=found.bias)
    loss = "softmax" if found.bias is None else "sigmoid"
    settings = ModelConfig(
        what, what, "frozen", projection="none", loss=loss, scale=found.scale, scale_min=low, scale_max=high
    )
    return core.requires_grad_(False), settings


@dataclass(frozen=True)
class Splits:
    """The samples of each part (validation and test may be empty), and numbers to read the test result against."""

    train: list[Sample] | ShardSet
    val: list[Sample]
    test: list[Sample]
    references: dict[str, float]


def manifest_path(data: str) -> Path:
    """Return the manifest of a path, or of a named set, which is written on first use."""
    return DATA[data]() if data in DATA else Path(expand(data))


def read_split(data: str, split: str, image_root: str | None = None) -> list[Sample]:
    """Read one split of a manifest, a named set or a Hugging Face dataset."""
    return select(_read(data, image_root), split, data)


def _read(data: str, image_root: str | None) -> list[Sample]:
    root = expand(image_root) if image_root else None
    if is_table(data):
        return read_table(expand(data), root)
    if _names_shards(data):
        raise ValueError(
            f"{data} is a set of shards, which is one split to train on; expected a manifest or a Hugging Face dataset "
            "to evaluate on: give it with --val_data (lilt evaluate: --data), or train with --val_split none "
            "--test_split none"
        )
    return read_manifest(manifest_path(data), root)


def _names_shards(data: str) -> bool:
    return data not in DATA and is_shards(expand(data))


def build_splits(config: TrainConfig) -> Splits:
    """Read the three splits of a training run; `none` is empty."""
    if config.train_split == "none":
        raise ValueError("train_split=none leaves nothing to train on; name a split of the manifest")
    held_out = config.val_data or config.data
    wanted = (config.val_split, config.test_split)
    train: list[Sample] | ShardSet
    samples: list[Sample] | None = None
    if _names_shards(config.data):
        if wanted != ("none", "none") and _names_shards(held_out):
            _read(held_out, None)  # says what is missing, before shards are read
        train = _read_shards(config)
    else:
        samples = _read(config.data, config.image_root)
        train = _first(select(samples, config.train_split, config.data), config)
    if wanted == ("none", "none"):
        return Splits(train, [], [], {})
    if samples is None or held_out != config.data:
        samples = _read(held_out, config.image_root)
    val, test = ([] if split == "none" else select(samples, split, held_out) for split in wanted)
    known = {} if is_table(held_out) else read_references(manifest_path(held_out), config.test_split)
    return Splits(train, val, test, known)


def _first(samples: list[Sample], config: TrainConfig) -> list[Sample]:
    """Return the first max_images of a seeded shuffle, in their old order."""
    if config.max_images is None or config.max_images >= len(samples):
        return samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed))
    return [samples[i] for i in sorted(order[: config.max_images].tolist())]


def _read_shards(config: TrainConfig) -> ShardSet:
    for name, plain in (("train_split", "train"), ("max_images", None)):
        if (given := getattr(config, name)) != plain:
            raise ValueError(
                f"{name}={given} cannot be had of shards, which are one split and read as they lie; expected whole "
                f"shards; leave {name} out and name fewer files in --data"
            )
    files = shard_paths(expand(config.data))
    # each rank indexes its share, and finds that of the others in the cache
    share = files[distributed.rank() :: distributed.world_size()]
    bar = {"console": Console(stderr=True), "transient": True, "disable": not distributed.is_main()}
    for file in track(share, "indexing shards", **bar):  # type: ignore[arg-type]
        index_of(file)
    distributed.barrier()
    return ShardSet(files)


def build_pairs(config: TrainConfig, model: TwoTower, samples: list[Sample] | ShardSet) -> tuple[Pairs, Collate]:
    """Return the training pairs as both towers want them, and what makes batches of them."""
    image, language = _contracts(model)
    transform = train_transform(image, config.augment)
    options: dict[str, Any] = {"captions": config.captions, "seed": config.seed}
    if isinstance(samples, ShardSet):
        if config.views is not None:
            raise ValueError(
                f"views={config.views} cannot be had of shards, which are read as they lie; expected a manifest; leave "
                "views out"
            )
        dataset: Pairs = ShardDataset(samples, transform, **options)
    else:
        views = 1 if config.augment == "none" else config.views
        dataset = PairDataset(samples, language, transform, max_tokens=config.train_tokens, views=views, **options)
    shape = tuple(model.vision.example().shape[1:])  # type: ignore[union-attr]
    return dataset, Collate(language, shape, config.train_tokens)


def build_teacher_of(config: TrainConfig, model: TwoTower, needs: str) -> Teacher | None:
    """Return the teacher of a run, None where it has none; needs: features or logits."""
    if config.teacher is None:
        return None
    return build_teacher(config.teacher, needs, _contracts(model)[0])


def _contracts(model: TwoTower) -> tuple[ImageContract, Tokenizer]:
    image, language = model.vision.contract, model.text.contract
    assert isinstance(image, ImageContract)
    assert not isinstance(language, ImageContract)
    return image, language
