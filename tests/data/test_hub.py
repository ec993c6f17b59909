"""A Hugging Face dataset gives what a manifest of its rows gives; its pictures are read from where they lie."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lilt.build import build_splits, read_split
from lilt.config import TrainConfig
from lilt.data import (
    Batches,
    Collate,
    PairDataset,
    Sample,
    hub,
    open_image,
    pack,
    read_image,
    read_manifest,
    read_table,
    select,
    train_transform,
)
from lilt.data.hub import row_stamp
from lilt.towers import ImageContract
from lilt.towers.tokenizer import HfTokenizer

TRANSFORM = train_transform(ImageContract(16), "crop(0.3,1)+hflip")


@pytest.fixture(scope="module")
def samples(pictures: Path) -> list[Sample]:
    return read_manifest(pictures / "manifest.jsonl")


def rows(samples: list[Sample], **names: str) -> datasets.Dataset:
    """One row a sample, with the bytes of its picture; names may rename columns."""
    columns = {
        "image": [{"bytes": Path(s.image).read_bytes(), "path": None} for s in samples],
        "captions": [list(s.captions) for s in samples],
        "part": [s.split for s in samples],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return table.rename_columns(names)


@pytest.fixture(scope="module")
def saved(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec of a dataset with three splits, saved to disk."""
    folder = tmp_path_factory.mktemp("table") / "of pictures"
    splits = {name: rows(select(samples, name)) for name in ("train", "val", "test")}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"hf:{folder}"


def same(found: list[Sample], expected: list[Sample]) -> bool:
    """Say whether captions, splits and pictures are equal, in order."""
    assert [(s.captions, s.split) for s in found] == [(s.captions, s.split) for s in expected]
    ours, theirs = ([open_image(s.image).tobytes() for s in part] for part in (found, expected))
    return ours == theirs


def test_a_saved_dataset_is_read_with_its_splits(saved: str, samples: list[Sample]) -> None:
    for split in ("train", "val", "test"):
        assert same(read_split(saved, split), select(samples, split))
    with pytest.raises(ValueError, match=r"has no split 'vall'; it has: test, train, val. Did you mean 'val'"):
        read_split(saved, "vall")
    splits = build_splits(TrainConfig(data=saved, max_images=5))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.references) == (5, 6, 6, {})


def test_columns_may_have_other_names_and_one_of_them_the_split(samples: list[Sample], tmp_path: Path) -> None:
    rows(samples, image="photo", captions="sentences_raw").save_to_disk(tmp_path / "table")
    spec = f"hf:{tmp_path / 'table'}"
    assert same(read_table(f"{spec}?image=photo&captions=sentences_raw&split=part"), samples)
    whole = read_table(f"{spec}?image=photo&captions=sentences_raw")
    assert {s.split for s in whole} == {"train"}
    with pytest.raises(
        ValueError, match=r"has no image column; it has: photo, sentences_raw, part.* Name it with \?image="
    ):
        read_table(spec)
    with pytest.raises(ValueError, match=r"has no column 'foto'; it has: photo.* Did you mean 'photo'\?"):
        read_table(f"{spec}?image=foto&captions=sentences_raw")
    with pytest.raises(
        ValueError, match=r"has no option 'caption'; it takes: image, captions.* Did you mean 'captions'"
    ):
        read_table(f"{spec}?caption=sentences_raw")


def test_a_folder_of_parquet_is_read(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        rows(select(samples, split)).to_parquet(tmp_path / "files" / f"{split}.parquet")
    found = read_table(f"hf:{tmp_path / 'files'}")
    assert same(select(found, "train"), select(samples, "train"))
    assert same(select(found, "test"), select(samples, "test"))


@pytest.mark.parametrize("kind", ["string", "binary", "large_string"])
def test_pictures_may_be_paths_or_plain_bytes(samples: list[Sample], pictures: Path, tmp_path: Path, kind: str) -> None:
    files = [Path(s.image) for s in samples]
    cells: list[Any] = [f.read_bytes() if kind == "binary" else f.name for f in files]
    features = datasets.Features({"file_name": datasets.Value(kind), "text": datasets.Value("string")})
    columns = {"file_name": cells, "text": [s.captions[0] for s in samples]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "table")
    found = read_table(f"hf:{tmp_path / 'table'}", pictures)
    assert same(found, [Sample(s.image, s.captions[:1], "train") for s in samples])


def test_pairs_and_order_are_those_of_the_manifest(saved: str, samples: list[Sample], tiny_text: str) -> None:
    tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(tiny_text.removeprefix("hf:")), 16)
    datas = [
        PairDataset(s, tokenizer, TRANSFORM, seed=3) for s in (read_split(saved, "train"), select(samples, "train"))
    ]
    batches = []
    for workers, data in zip((2, 0), datas, strict=True):
        sampler = Batches(data.order(1), 4)
        loader = DataLoader(
            data, batch_sampler=sampler, collate_fn=Collate(tokenizer, (3, 16, 16)), num_workers=workers
        )
        batches.append([batch for batch, _ in zip(loader, range(5), strict=False)])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert bool(one.valid.all())
        assert torch.equal(one.text_id, other.text_id)
        assert torch.equal(one.tokens["input_ids"], other.tokens["input_ids"])


def test_a_dataset_is_packed_into_shards(saved: str, samples: list[Sample], tmp_path: Path) -> None:
    for name, source in (("hub", read_split(saved, "train")), ("manifest", select(samples, "train"))):
        pack(source, tmp_path / name, per_shard=5)
    ours, theirs = ((tmp_path / name / "00001.tar").read_bytes() for name in ("hub", "manifest"))
    assert ours == theirs


def test_a_broken_picture_is_a_fault_with_its_row(tmp_path: Path) -> None:
    broken: list[Any] = [{"bytes": b"no picture", "path": None}, None]
    table = datasets.Dataset.from_dict({"image": broken, "caption": ["a boat"] * 2})
    table.cast_column("image", datasets.Image(decode=False)).save_to_disk(tmp_path / "table")
    found = read_table(f"hf:{tmp_path / 'table'}")
    reasons = []
    for number, sample in enumerate(found):
        image, fault = read_image(str(sample.image), TRANSFORM)
        assert image is None
        assert fault is not None
        assert fault[0] == f"hf:{tmp_path / 'table'}#train/{number}"
        reasons.append(fault[1])
    assert reasons[0].startswith("UnidentifiedImageError: ")
    assert reasons[1] == "ValueError: the row has no picture"


@pytest.fixture
def reopened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the stamps of rows as another process finds them."""

    def stamps(spec: str, rows: int = 2) -> list[str | None]:
        hub._open.cache_clear()
        hub._outside.cache_clear()
        return [row_stamp(f"{spec}#train/{row}") for row in range(rows)]

    return stamps


def plain(colour: int) -> datasets.Dataset:
    """Two pictures of one size in a table of one size, whatever the colour."""
    pictures = [Image.new("RGB", (8, 8), (colour, colour, row)) for row in range(2)]
    return datasets.Dataset.from_dict({"image": pictures, "caption": ["a", "b"]}).cast_column("image", datasets.Image())


def test_rows_of_a_dataset_saved_again_are_others(tmp_path: Path, reopened: Any) -> None:
    spec = f"hf:{tmp_path / 'table'}"
    plain(7).save_to_disk(tmp_path / "table")
    first = reopened(spec)
    assert None not in first
    assert reopened(spec) == first
    shutil.rmtree(tmp_path / "table")
    plain(8).save_to_disk(tmp_path / "table")
    assert not set(reopened(spec)) & set(first)


def test_rows_in_memory_are_told_by_what_datasets_says(
    tmp_path: Path, reopened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    found = []
    for colour in (7, 7, 8):
        shutil.rmtree(tmp_path / "table", ignore_errors=True)
        plain(colour).save_to_disk(tmp_path / "table")
        found.append(reopened(f"hf:{tmp_path / 'table'}"))
    assert found[0] == found[1] != found[2]
    assert None not in found[0]
    # as if a later version of the package said nothing
    monkeypatch.setattr(hub, "_load", lambda *spec: {"train": without_fingerprint(plain(8))})
    assert reopened(f"hf:{tmp_path / 'table'}") == [None, None]


def without_fingerprint(table: datasets.Dataset) -> datasets.Dataset:
    cast = table.cast_column

    def keep(*options: Any) -> datasets.Dataset:
        table._fingerprint = "again"
        return cast(*options)

    table.cast_column = keep
    del table._fingerprint
    return table


def test_a_picture_that_the_dataset_only_points_to_is_told_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    # datasets leaves metadata.csv open
    lines = (json.dumps({"file_name": f"{name}.png", "text": name}) for name in ("one", "two"))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    names = [str(sample.image) for sample in read_table(f"hf:{tmp_path}")]
    first = [row_stamp(name) for name in names]
    Image.new("RGB", (9, 9), (255, 0, 0)).save(folder / "one.png")
    second = [row_stamp(name) for name in names]
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert None not in first


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["x"], "label": [3]}, r"has no captions column; it has: image, label.*Name it with \?captions="),
        ({"image": [3], "text": ["a"]}, r"column 'image' holds Value\(.*\); expected pictures, bytes or paths; name"),
        ({"image": ["x", "y"], "text": ["a", ""]}, 'split train row 1: "text" is empty; give at least one caption'),
        ({"image": ["x"], "text": [None]}, 'split train row 0: "text" must be a text or a list of texts'),
    ],
)
def test_a_table_that_cannot_be_used_is_explained(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "table")
    with pytest.raises(ValueError, match=message):
        read_table(f"hf:{tmp_path / 'table'}")


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"datasets could not load '.*': .*; expected a folder of save_to_disk, a folder"
    ):
        read_table(f"hf:{tmp_path}")


def test_without_the_package_its_installation_is_explained(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"needs the package datasets, which is not installed; .*pip install 'lilt\[datasets\]'"
    ):
        read_table(f"{saved}?captions=captions")


def test_environment_variables_are_filled_in(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(saved.removeprefix("hf:"))
    monkeypatch.setenv("TABLES", str(folder.parent))
    found = read_split(f"hf:$TABLES{os.sep}{folder.name}", "val")
    assert len(found) == 6
    assert open_image(found[0].image).size[1] == 40
