"""Manifests in five formats, and an error with file and line for each thing that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilt.data import Sample, read_manifest, select


def write(folder: Path, name: str, content: str | list | dict) -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


FORMATS: dict[str, str | list | dict] = {
    "a.jsonl": '{"image": "x.jpg", "captions": ["one", "two"], "split": "val"}\n\n{"image": "y.jpg", "caption": "é"}\n',
    "a.csv": 'image,caption,split\nx.jpg,one,val\nx.jpg,two,val\ny.jpg,"é",\n',
    "a.tsv": "filepath\ttitle\tsplit\nx.jpg\tone\tval\nx.jpg\ttwo\tval\ny.jpg\té\ttrain\n",
    "karpathy.json": {
        "images": [
            {"filename": "x.jpg", "split": "val", "sentences": [{"raw": "one"}, {"raw": "two"}]},
            {"filename": "y.jpg", "split": "train", "sentences": [{"raw": "é", "tokens": ["é"]}]},
        ]
    },
    "lilt.json": [
        {"image": "x.jpg", "caption": "one", "split": "val"},
        {"image": "x.jpg", "caption": "two", "split": "val"},
        {"image": "y.jpg", "caption": ["é"]},
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, FORMATS[name])
    assert read_manifest(file) == [
        Sample(tmp_path / "x.jpg", ("one", "two"), "val"),
        Sample(tmp_path / "y.jpg", ("é",), "train"),
    ]


def test_a_table_saved_by_a_spreadsheet_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffimage,caption\nx.jpg,one\n".encode())
    assert read_manifest(tmp_path / "a.csv") == [Sample(tmp_path / "x.jpg", ("one",), "train")]


@pytest.mark.parametrize(("folder", "path"), [("val2014", "val2014/x.jpg"), ("", "x.jpg")])
def test_karpathy_joins_folder_and_name(tmp_path: Path, folder: str, path: str) -> None:
    image = {"filepath": folder, "filename": "x.jpg", "split": "test", "sentences": [{"raw": "one"}]}
    file = write(tmp_path, "coco.json", {"images": [image]})
    assert read_manifest(file, "/images") == [Sample(Path("/images") / path, ("one",), "test")]


def test_image_root_replaces_the_folder_of_the_manifest(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", FORMATS["a.jsonl"])
    assert read_manifest(file, tmp_path / "images")[0].image == tmp_path / "images" / "x.jpg"


def test_one_image_in_two_splits_stays_two_samples(tmp_path: Path) -> None:
    rows = "image,caption,split\nx.jpg,one,train\nx.jpg,two,val\nx.jpg,three,train\n"
    samples = read_manifest(write(tmp_path, "a.csv", rows))
    assert [(s.captions, s.split) for s in samples] == [(("one", "three"), "train"), (("two",), "val")]


GOOD = '{"image": "x.jpg", "captions": ["one"]}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", GOOD + "{oops}\n", r"m.jsonl line 2: not JSON \(.*\); expected one object a line; mend the line"),
        ("m.jsonl", GOOD + "\n[1]\n", "m.jsonl line 3: expected an object with image and captions, not list"),
        ("m.jsonl", GOOD + '{"captions": ["a"]}', "m.jsonl line 2: no image; expected a path under image, filepath"),
        ("m.jsonl", GOOD + '{"image": 5, "captions": ["a"]}', "m.jsonl line 2: no image"),
        ("m.jsonl", GOOD + '{"image": "y.jpg"}', 'm.jsonl line 2: no captions; expected a list under "captions"'),
        ("m.jsonl", GOOD + '{"image": "y.jpg", "captions": []}', 'm.jsonl line 2: "captions" is empty; give at least'),
        ("m.jsonl", GOOD + '{"image": "y.jpg", "captions": ["a", " "]}', 'm.jsonl line 2: "captions" is empty'),
        ("m.jsonl", '{"image": "y.jpg", "captions": ["a", 3]}', "m.jsonl line 1: .* must be a text or a list of texts"),
        ("m.jsonl", '{"image": "y.jpg", "caption": {"en": "a"}}', 'm.jsonl line 1: "caption" must be a text'),
        ("m.jsonl", "", "m.jsonl is empty; expected one image a line"),
        ("m.csv", "image,caption\nx.jpg,one\ny.jpg,\n", 'm.csv line 3: "caption" is empty'),
        ("m.csv", "image,caption\nx.jpg\n", 'm.csv line 2: "caption" must be a text'),
        (
            "m.csv",
            'image,caption\nx.jpg,one\ny.jpg,"two\n',
            "m.csv line 3: unexpected end of data; expected a plain table",
        ),
        ("m.csv", "image,caption\nx.jpg,a boat, at sea\n", "m.csv line 2: 3 cells under 2 headings.*quotes"),
        ("m.csv", "picture,caption\nx.jpg,one\n", "m.csv line 2: no image"),
        ("m.json", "{\n'a'", "m.json line 2: not JSON"),
        ("m.json", {"photos": []}, "m.json: expected a list of samples, or an object with a list 'images'"),
        ("m.json", [{"image": "x.jpg", "caption": "a"}, {"image": "x.jpg"}], "m.json entry 2: no captions"),
        ("m.json", {"images": [{"filename": "x", "sentences": [{"text": "a"}]}]}, "m.json entry 1: .* must be a text"),
        ("m.txt", "x", "m.txt: unknown ending '.txt'; expected .jsonl, .csv, .tsv, .json; rename or convert"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_and_line(
    tmp_path: Path, name: str, content: str | list | dict, message: str
) -> None:
    file = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_manifest(file)


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.json"])
def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"image": "x.jpg", "captions": ["one"]}\n{"image": "caf\xe9.jpg"}\n')
    with pytest.raises(ValueError, match=rf"{name} line 2: not UTF-8 .*; save it as UTF-8"):
        read_manifest(tmp_path / name)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest '.*nowhere.jsonl' does not exist; expected a .jsonl.*check --data"):
        read_manifest(tmp_path / "nowhere.jsonl")


def samples() -> list[Sample]:
    return [Sample(Path(f"{s}.jpg"), ("a",), s) for s in ("train", "restval", "val")]


def test_splits_are_joined_with_a_bar() -> None:
    assert [s.split for s in select(samples(), "train|restval")] == ["train", "restval"]


@pytest.mark.parametrize("split", ["tain", "train|tain"])
def test_an_unknown_split_names_what_exists(split: str) -> None:
    known = "set.jsonl has no split 'tain'; it has: restval, train, val. Did you mean 'train'?"
    with pytest.raises(ValueError, match=known):
        select(samples(), split, "set.jsonl")
