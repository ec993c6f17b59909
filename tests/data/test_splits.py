"""The splits of a run from manifests and shards, and what is said when shards are asked for what they cannot have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lilt.build import build_splits
from lilt.config import TrainConfig
from lilt.data import ShardSet, pack, read_manifest, select


@pytest.fixture(scope="module")
def folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards")
    pack(select(read_manifest(pictures / "manifest.jsonl"), "train"), target, per_shard=5)
    return target


def test_shards_train_and_a_manifest_measures(folder: Path, pictures: Path) -> None:
    manifest = str(pictures / "manifest.jsonl")
    splits = build_splits(TrainConfig(data=f"{folder}/{{00000..00002}}.tar", val_data=manifest))
    assert isinstance(splits.train, ShardSet)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 6, 6)
    assert {s.split for s in splits.val} == {"val"}


def test_shards_alone_train_without_measuring(folder: Path) -> None:
    splits = build_splits(TrainConfig(data=str(folder), val_split="none", test_split="none"))
    assert (len(splits.train), splits.val, splits.test) == (12, [], [])


def test_val_data_of_a_manifest_replaces_its_own_splits(pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("image,caption,split\nred0.png,a red picture,val\nblue0.png,blue,test\n")
    options: dict[str, Any] = {"val_data": str(other), "image_root": str(pictures)}
    splits = build_splits(TrainConfig(data=str(pictures / "manifest.jsonl"), **options))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 1, 1)
    assert splits.val[0].image == pictures / "red0.png"


def test_environment_variables_stand_beside_braces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", str(folder))
    splits = build_splits(TrainConfig(data="${SHARDS}/{00000..00001}.tar", val_split="none", test_split="none"))
    assert len(splits.train) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"is a set of shards, which is one split to train on; expected a manifest .* --val_data .*--val_split none",
        ),
        ({"val_split": "none"}, "is a set of shards, which is one split to train on"),
        ({"test_split": "none"}, "is a set of shards, which is one split to train on"),
        ({"val_data": "SHARDS"}, "is a set of shards, which is one split to train on"),
        ({"val_data": "MANIFEST", "val_split": "vall"}, "has no split 'vall'; it has: test, train, val. Did you mean"),
        ({"val_data": "nowhere.jsonl"}, "manifest 'nowhere.jsonl' does not exist"),
        (
            {"val_data": "MANIFEST", "train_split": "restval"},
            "train_split=restval cannot be had of shards.*fewer files",
        ),
        ({"val_data": "MANIFEST", "max_images": 3}, "max_images=3 cannot be had of shards, which are one split"),
        ({"train_split": "none"}, "train_split=none leaves nothing to train on"),
    ],
)
def test_what_shards_cannot_have_is_explained(
    folder: Path, pictures: Path, options: dict[str, Any], message: str
) -> None:
    names = {"SHARDS": str(folder), "MANIFEST": str(pictures / "manifest.jsonl")}
    filled: dict[str, Any] = {
        key: names.get(value, value) if isinstance(value, str) else value for key, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        build_splits(TrainConfig(data=str(folder), **filled))
