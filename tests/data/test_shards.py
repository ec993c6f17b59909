"""Shards give the pairs that their manifest gives; what is broken in them is one fault a sample, and never an end."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lilt.data import (
    Batch,
    Batches,
    Collate,
    PairDataset,
    Pairs,
    Sample,
    ShardDataset,
    ShardSet,
    pack,
    read_manifest,
    select,
    shard_paths,
    train_transform,
)
from lilt.data.shard_index import ShardIndex, beside, index_of
from lilt.towers import ImageContract
from lilt.towers.tokenizer import HfTokenizer

TRANSFORM = train_transform(ImageContract(16), "crop(0.3,1)+hflip+jitter")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep indices out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lilt" / "shards"


@pytest.fixture(scope="module")
def tokenizer(tiny_text: str) -> HfTokenizer:
    return HfTokenizer(AutoTokenizer.from_pretrained(tiny_text.removeprefix("hf:")), 16)


@pytest.fixture(scope="module")
def samples(pictures: Path) -> list[Sample]:
    """Twelve pictures; the first two have the captions of one another, the third one only."""
    train = select(read_manifest(pictures / "manifest.jsonl"), "train")
    train[2] = Sample(train[2].image, train[2].captions[:1], "train")
    return train


@pytest.fixture(scope="module")
def folder(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 5, 5 and 2 samples."""
    target = tmp_path_factory.mktemp("shards")
    pack(samples, target, per_shard=5)
    return target


Member = tuple[str, bytes]


def write(tar: Path, members: list[Member], **options: Any) -> Path:
    with tarfile.open(tar, "w", **options) as stream:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            stream.addfile(info, io.BytesIO(content))
    return tar


def shards(*tars: Path, **options: Any) -> ShardDataset:
    return ShardDataset(ShardSet(tars), TRANSFORM, **options)


def same_image(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def groups(ids: list[int]) -> list[list[int]]:
    """Return which places hold one id."""
    return sorted([i for i, other in enumerate(ids) if other == one] for one in set(ids))


@pytest.mark.parametrize("captions", ["one", "all"])
def test_shards_give_the_pairs_of_their_manifest(
    samples: list[Sample], folder: Path, tokenizer: HfTokenizer, captions: str
) -> None:
    options: dict[str, Any] = {"captions": captions, "seed": 3}
    manifest: Pairs = PairDataset(samples, tokenizer, TRANSFORM, max_tokens=5, **options)
    packed: Pairs = shards(*shard_paths(str(folder)), **options)
    assert len(packed) == len(manifest) == (12 if captions == "one" else 34)
    assert packed.groups.tolist() == ([5, 5, 2] if captions == "one" else [13, 15, 6])
    keys = [(draw, unit) for draw in range(3) for unit in range(len(manifest))]
    ours, theirs = ([data[key] for key in keys] for data in (packed, manifest))
    for one, other in zip(ours, theirs, strict=True):
        assert same_image(one.image, other.image)
        assert (one.image_id, one.fault) == (other.image_id, None)
    collate = Collate(tokenizer, (3, 16, 16), 5)
    batches = [collate(pairs).tokens for pairs in (ours, theirs, [*ours[:3], *theirs[3:]])]  # of both kinds too
    assert all(torch.equal(batches[0][name], batch[name]) for batch in batches for name in batch)
    assert batches[0]["input_ids"].shape[1] == 5
    assert groups([p.text_id for p in ours]) == groups([p.text_id for p in theirs])
    assert all(0 <= p.text_id < 2**63 for p in ours)


def batches(dataset: Pairs, tokenizer: HfTokenizer, steps: int, start: int = 0, **options: Any) -> list[Batch]:
    sampler = Batches(dataset.order(1, window=4), 4, start=start)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate(tokenizer, (3, 16, 16)), **options)
    return list(islice(loader, steps))


@pytest.mark.parametrize(
    "options", [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}], ids=str
)
def test_workers_change_nothing(folder: Path, tokenizer: HfTokenizer, options: dict[str, Any]) -> None:
    dataset = shards(*shard_paths(str(folder)))
    here = batches(dataset, tokenizer, 7)  # leaves the shards open in this process
    late = batches(dataset, tokenizer, 5, start=2, **options)
    for one, other in zip(here[2:], late, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.image_id, other.image_id)
        assert torch.equal(one.text_id, other.text_id)
        assert torch.equal(one.tokens["input_ids"], other.tokens["input_ids"])
        assert bool(one.valid.all())
    assert sorted(i for batch in here[:3] for i in batch.image_id.tolist()) == list(range(12))


def test_few_open_files_are_enough(folder: Path, tokenizer: HfTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilt.data.shards.OPEN", 1)
    dataset = shards(*shard_paths(str(folder)))
    again = shards(*shard_paths(str(folder)))
    for unit in [0, 11, 5, 1, 10, 6, 0]:
        assert same_image(dataset[0, unit].image, again[0, unit].image)
    assert len(dataset.shards._open) == 1


def test_names_are_found_by_image_id(folder: Path) -> None:
    one = ShardSet(shard_paths(str(folder)))
    assert len(one) == 12
    assert one[7] == f"{folder / '00001.tar'}:000000007"
    assert one[10:12] == [f"{folder / '00002.tar'}:{n:09d}" for n in (10, 11)]
    assert len(set(one)) == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_is_packed(samples: list[Sample], folder: Path) -> None:
    urls = [str(file) for file in shard_paths(str(folder))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()  # it leaves its files to the collector, which shall not blame a later test
    assert [r["__key__"] for r in found] == [f"{n:09d}" for n in range(12)]
    for sample, record in zip(samples, found, strict=True):
        assert json.loads(record["json"])["captions"] == list(sample.captions)
        image = record["png" if str(sample.image).endswith("png") else "jpg"]
        assert image == Path(sample.image).read_bytes()


def test_what_webdataset_writes_is_read(samples: list[Sample], tokenizer: HfTokenizer, tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%04d.tar"), maxcount=4, verbose=0) as writer:
        for number, sample in enumerate(samples):
            image = {Path(sample.image).suffix[1:]: Path(sample.image).read_bytes()}
            text = {"txt": sample.captions[0], "json": {"width": 3}} if number % 2 else {"json": {"caption": "a boat"}}
            writer.write({"__key__": f"some/folder/{number}", "cls": 3, **image, **text})  # type: ignore[no-untyped-call]
    dataset = shards(*sorted(tmp_path.glob("*.tar")))
    manifest = PairDataset(
        [Sample(s.image, (s.captions[0] if i % 2 else "a boat",), "train") for i, s in enumerate(samples)],
        tokenizer,
        TRANSFORM,
    )
    assert len(dataset) == 12
    for unit in range(12):
        assert same_image(dataset[0, unit].image, manifest[0, unit].image)
        assert dataset[0, unit].tokens == (samples[unit].captions[0] if unit % 2 else "a boat")


@pytest.fixture(scope="module")
def good(pictures: Path) -> list[Member]:
    """Four samples, nothing wrong with them."""
    names = ("red0.png", "red1.jpg", "blue0.png", "blue1.jpg")
    members = []
    for number, name in enumerate(names):
        members.append((f"{number}.{name.rpartition('.')[2]}", (pictures / name).read_bytes()))
        members.append((f"{number}.txt", f"caption {number} of a boat".encode()))
    return members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read(good: list[Member], tokenizer: HfTokenizer, tmp_path: Path, form: int) -> None:
    deep = "x" * 90 + "/" + "y" * 60 + "/" if form == tarfile.USTAR_FORMAT else "é" * 300 + "/"
    tar = write(tmp_path / "a.tar", [(deep + name, content) for name, content in good], format=form)
    dataset = shards(tar)
    plain = shards(write(tmp_path / "b.tar", good))
    assert dataset.paths[2] == f"{tar}:{deep}2"
    assert all(same_image(dataset[0, i].image, plain[0, i].image) for i in range(4))


def test_folders_hidden_files_and_other_members_are_passed_over(
    good: list[Member], tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as stream:
        folder = tarfile.TarInfo("deep.jpg")
        folder.type = tarfile.DIRTYPE
        stream.addfile(folder)
        for name, content in [("._0.png", b"x"), *good[:1], ("0.seg.png", b"x"), ("0.cls", b"3"), *good[1:]]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            stream.addfile(info, io.BytesIO(content))
    dataset = shards(tmp_path / "a.tar")
    assert [p.fault for p in (dataset[0, i] for i in range(len(dataset)))] == [None] * 4


CAPTIONS: dict[str, tuple[str, bytes, list[str]]] = {
    "text": ("txt", b" a red boat\n", ["a red boat"]),
    "byte order mark": ("txt", "\ufeffa red boat".encode(), ["a red boat"]),
    "upper case ending": ("TXT", b"a red boat", ["a red boat"]),
    "list under captions": ("json", b'{"captions": ["a boat", "the boat"]}', ["a boat", "the boat"]),
    "text under caption": ("json", b'{"caption": "a boat", "url": 3}', ["a boat"]),
    "list": ("json", b'["a boat", "the boat"]', ["a boat", "the boat"]),
    "raw": ("json", b'{"sentences": [{"raw": "a boat"}]}', ["a boat"]),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_may_be_written_in_these_ways(
    pictures: Path, tokenizer: HfTokenizer, tmp_path: Path, kind: str
) -> None:
    ending, content, expected = CAPTIONS[kind]
    image = (pictures / "red0.png").read_bytes()
    tar = write(tmp_path / "a.tar", [(f"x.{ending}", content), ("x.png", image)])
    dataset = shards(tar, captions="all")
    assert [dataset[0, i].tokens for i in range(len(dataset))] == expected


def test_text_beside_metadata_wins(good: list[Member], tokenizer: HfTokenizer, tmp_path: Path) -> None:
    members = [*good[:2], ("0.json", b'{"caption": "something else", "status": "success"}')]
    dataset = shards(write(tmp_path / "a.tar", members))
    assert dataset[0, 0].tokens == "caption 0 of a boat"


def damaged(good: list[Member], kind: str) -> list[Member]:
    """Do something to the third sample."""
    image, text = good[4:6]
    third: dict[str, list[Member]] = {
        "no caption": [image],
        "no image": [text],
        "half an image": [(image[0], image[1][: len(image[1]) // 2]), text],
        "no picture": [(image[0], b"<html>404</html>"), text],
        "empty image": [(image[0], b""), text],
        "empty caption": [image, (text[0], b"  \n")],
        "no captions": [image, ("2.json", b'{"captions": []}')],
        "other json": [image, ("2.json", b'{"width": 3}')],
        "a number": [image, ("2.json", b"3")],
        "half a json": [image, ("2.json", b'{"captions": ["a b')],
        "latin 1": [image, (text[0], b"caf\xe9")],
    }
    return [*good[:4], *third[kind], *good[6:]]


REASONS = {
    "no caption": "ValueError: no captions",
    "no image": "ValueError: no image",
    "half an image": "OSError: ",
    "no picture": "UnidentifiedImageError: ",
    "empty image": "ValueError: no image",
    "empty caption": 'ValueError: its .txt: "caption" is empty',
    "no captions": 'ValueError: its .json: "captions" is empty',
    "other json": "ValueError: no captions in its .json; expected them under captions, caption",
    "a number": 'ValueError: its .json: "captions" must be a text or a list of texts',
    "half a json": "JSONDecodeError: ",
    "latin 1": "UnicodeDecodeError: ",
}


@pytest.mark.parametrize("captions", ["one", "all"])
@pytest.mark.parametrize("kind", REASONS)
def test_a_broken_sample_is_a_fault_in_its_place_and_the_others_never_notice(
    good: list[Member], tokenizer: HfTokenizer, tmp_path: Path, kind: str, captions: str
) -> None:
    whole = shards(write(tmp_path / "whole.tar", good), captions=captions)
    tar = write(tmp_path / "a.tar", damaged(good, kind))
    dataset = shards(tar, captions=captions)
    assert len(dataset) == len(whole) == 4
    batch = Collate(tokenizer, (3, 16, 16))([dataset[0, unit] for unit in range(4)])
    other = Collate(tokenizer, (3, 16, 16))([whole[0, unit] for unit in range(4)])
    assert batch.valid.tolist() == [True, True, False, True]
    assert batch.image_id.tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.images[[0, 1, 3]], other.images[[0, 1, 3]])
    assert torch.equal(batch.text_id[[0, 1, 3]], other.text_id[[0, 1, 3]])
    ((name, reason),) = batch.faults
    assert name == f"{tar}:2"
    assert reason.startswith(REASONS[kind]), reason
    assert not dataset.faults


def test_a_key_that_comes_twice_is_two_samples(good: list[Member], tokenizer: HfTokenizer, tmp_path: Path) -> None:
    members = [*good[:2], *good[:2], good[2], good[2], good[3]]
    dataset = shards(write(tmp_path / "a.tar", members))
    found = [dataset[0, i] for i in range(4)]
    assert [p.image is not None for p in found] == [True, True, False, True]
    assert [p.image_id for p in found] == [0, 1, 2, 3]


def test_a_tar_torn_anywhere_gives_what_stands_before_the_tear(
    good: list[Member], tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    content = write(tmp_path / "whole.tar", good).read_bytes()
    whole = shards(tmp_path / "whole.tar")
    with tarfile.open(tmp_path / "whole.tar") as stream:
        ends = [m.offset_data + m.size for m in stream][1::2]  # of each caption, which stands last
    tar = tmp_path / "torn.tar"
    for length in [*range(513, ends[-1], 97), *(e + d for e in ends for d in (-1, 0, 1))]:
        tar.write_bytes(content[:length])
        dataset = shards(tar)
        ((name, reason),) = dataset.faults
        assert name == str(tar)
        assert reason.startswith(f"torn after {len(dataset)} samples: ")
        complete = sum(length >= end for end in ends)
        pairs = [dataset[0, unit] for unit in range(len(dataset))]
        assert [p.image is not None for p in pairs] == [True] * complete + [False] * (len(pairs) - complete)
        assert all(same_image(p.image, whole[0, i].image) for i, p in enumerate(pairs[:complete]))


@pytest.mark.parametrize("content", [b"", b"no tar at all", bytes(100), b"\x1f\x8b" + bytes(2000)])
def test_a_file_that_is_no_tar_is_a_fault_beside_others_and_an_error_alone(
    good: list[Member], tokenizer: HfTokenizer, tmp_path: Path, content: bytes
) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(content)
    dataset = shards(bad, write(tmp_path / "good.tar", good))
    assert len(dataset) == 4
    assert dataset[0, 3].fault is None
    assert [name for name, _ in dataset.faults] == [str(bad)]
    with pytest.raises(ValueError, match=r"no sample in 1 shards, the first .*bad.tar \(.*\); expected an image"):
        ShardSet([bad])


def test_tars_without_samples_are_an_error(tmp_path: Path) -> None:
    tars = [write(tmp_path / f"{i}.tar", [("x.cls", b"3")]) for i in range(3)]
    with pytest.raises(ValueError, match=r"no sample in 3 shards, the first of them .*0.tar \(.* is empty\); .*--data"):
        ShardSet(tars)


def equal(one: ShardIndex, other: ShardIndex) -> bool:
    names = ("image", "text", "json", "count", "names")
    return one.torn == other.torn and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


def forbid_scanning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tar: Path) -> None:
        raise AssertionError(f"{tar} was read again")

    monkeypatch.setattr("lilt.data.shard_index.scan", refuse)


def test_an_index_is_made_once(
    good: list[Member], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write(tmp_path / "a.tar", damaged(good, "no caption"))
    first = index_of(tar)
    assert [f.suffix for f in cache.iterdir()] == [".index"]
    assert [f.name for f in tmp_path.glob("a*")] == ["a.tar"]  # nothing is written beside the user's data
    assert first.count.tolist() == [1, 1, 0, 1]
    with monkeypatch.context() as inside:
        forbid_scanning(inside)
        assert equal(index_of(tar), first)
    write(tar, good)
    assert index_of(tar).count.tolist() == [1, 1, 1, 1]


def test_a_packed_index_goes_with_a_copy(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("00001.tar", "00001.tar.index"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        os.utime(tmp_path / name, (1, 1))
    forbid_scanning(monkeypatch)
    assert len(index_of(tmp_path / "00001.tar")) == 5
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, None])
def test_an_index_that_does_not_fit_is_made_anew(
    good: list[Member], folder: Path, tmp_path: Path, cache: Path, content: bytes | None
) -> None:
    tar = write(tmp_path / "a.tar", good)
    expected = index_of(tar)
    wrong = (folder / "00000.tar.index").read_bytes() if content is None else content
    beside(tar).write_bytes(wrong)
    for file in cache.iterdir():
        file.write_bytes(wrong)
    assert equal(index_of(tar), expected)


def test_a_shard_that_changes_under_a_run_stops_it(good: list[Member], tokenizer: HfTokenizer, tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", good)
    dataset = shards(tar)
    write(tar, good[:4])
    with pytest.raises(ValueError, match=r"a.tar holds 2 samples and held 4 when the run began; expected shards"):
        dataset[0, 1]


def test_another_way_with_captions_is_an_error(folder: Path, tokenizer: HfTokenizer) -> None:
    with pytest.raises(ValueError, match=r"captions='two'; expected 'one' .* or 'all'; choose one"):
        shards(*shard_paths(str(folder)), captions="two")
