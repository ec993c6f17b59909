"""Labels from folders, fields and file names, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lilt.evaluate.labelled import Pattern, check_range, number_labels, read_labelled
from tests.evaluate.conftest import grey, manifest


def test_a_folder_has_one_folder_a_class(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.jpg", "cat/deeper/3.png", "dog/1.webp"):
        grey(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose.txt").write_text("of no class")
    found = read_labelled(tmp_path)
    assert [(Path(e.image).relative_to(tmp_path).as_posix(), e.label, e.split) for e in found.entries] == [
        ("cat/1.png", "cat", None), ("cat/2.jpg", "cat", None), ("cat/deeper/3.png", "cat", None),
        ("dog/1.webp", "dog", None),
    ]  # fmt: skip
    assert found.splits == []
    assert found.split("test", only=True) == found.entries
    for options in ({"key": "label"}, {"pattern": Pattern("(c)")}):
        with pytest.raises(
            ValueError, match="is a folder, and its labels are the names of the folders in it; expected"
        ):
            read_labelled(tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no splits; expected 'train' among others; add a split to each line"):
        found.split("train")


def test_a_folder_of_splits_has_classes_in_each(tmp_path: Path) -> None:
    for name in ("train/0/1.png", "train/10/1.png", "test/9/1.png"):
        grey(tmp_path / name)
    found = read_labelled(tmp_path)
    assert found.splits == ["test", "train"]
    assert [e.label for e in found.split("train|test")] == [9, 0, 10]  # numbers, not text
    assert number_labels(found.entries) == {0: 0, 9: 1, 10: 2}


def test_a_table_has_labels_as_text_and_json_as_either(tmp_path: Path) -> None:
    table = tmp_path / "x.csv"
    table.write_text("image,class,split\na.png,3,test\nb.png,12,test\n")
    assert [e.label for e in read_labelled(table).entries] == [3, 12]
    lines = manifest(tmp_path / "x.jsonl", [{"image": "a.png", "label": 3}, {"image": "b.png", "label": "12"}])
    found = read_labelled(Path(lines), root="/elsewhere")
    assert [(e.label, e.image, e.split) for e in found.entries] == [
        (3, "/elsewhere/a.png", None), (12, "/elsewhere/b.png", None)
    ]  # fmt: skip
    named = manifest(tmp_path / "y.jsonl", [{"image": "a.png", "label": "x", "index": 7, "captions": ["one", "two"]}])
    entry = read_labelled(Path(named), key="index").entries[0]
    assert (entry.label, entry.texts) == (7, ("one", "two"))


def test_a_label_in_a_file_name_is_found_or_counted(tmp_path: Path) -> None:
    names = ["images/port_1.jpg", "images/port_2.jpg", "images/00017.jpg", "Pond_3.jpg", "pond_4.jpg"]
    lines = manifest(tmp_path / "x.jsonl", [{"image": name, "split": "test"} for name in names])
    found = read_labelled(Path(lines), pattern=Pattern.parse("'([a-z]+)_'"))
    assert [e.label for e in found.entries] == ["port", "port", "pond"]
    assert found.unlabelled == 2
    with pytest.raises(ValueError, match=r"has no labelled pictures; expected file names that \(x\+\)_ fits; check"):
        read_labelled(Path(lines), pattern=Pattern.parse("(x+)_"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a-z]+_", r"label_from=\[a-z\]\+_ has 0 groups; expected one, around the label"),
        ("([a-z])([0-9])", "has 2 groups; expected one"),
        ("([a-z", r"label_from=\(\[a-z is no regular expression: .*; write"),
    ],
)
def test_a_pattern_has_one_group(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern.parse(text)


IMAGE = {"image": "a.png"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{**IMAGE, "label": "x"}, {**IMAGE, "captions": ["x"]}],
            "x.jsonl line 2: no label; .* it has image, captions;",
        ),
        ([{**IMAGE, "label": ""}], "x.jsonl line 1: no label"),
        ([{**IMAGE, "label": True}], "x.jsonl line 1: no label"),
        ([{**IMAGE, "label": 1.5}], "x.jsonl line 1: no label"),
        (
            [{**IMAGE, "label": 1}, {**IMAGE, "label": "x"}],
            "line 1 has the label 1 and x.jsonl line 2 'x'; expected num",
        ),
        (["text"], "x.jsonl line 1: expected an object with image and label, not str; mend it"),
        ([], "x.jsonl has no labelled pictures; expected pictures in a folder for each class"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_an_error(tmp_path: Path, records: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labelled(Path(manifest(tmp_path / "x.jsonl", records)))


@pytest.mark.parametrize("label", [-1, 3, "x"])
def test_a_label_out_of_range_is_named_with_its_line(tmp_path: Path, label: Any) -> None:
    lines = manifest(tmp_path / "x.jsonl", [{**IMAGE, "label": label}])
    message = f"line 1: label {label!r} is out of range; the model has 3 classes, expected a number from 0 to 2; mend"
    with pytest.raises(ValueError, match=message):
        check_range(read_labelled(Path(lines)).entries, 3, "the model")
