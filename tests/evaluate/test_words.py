"""Class names find their labels; templates have a place for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lilt.evaluate.labelled import Entry
from lilt.evaluate.words import fill, match_names, read_classes, read_templates


def entries(*labels: int | str) -> list[Entry]:
    return [Entry("a.png", (), label, None, f"line {i}") for i, label in enumerate(labels, 1)]


def test_the_published_templates_and_names_come_along() -> None:
    templates = read_templates("openai80")
    assert len(set(templates)) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in templates)
    names = read_classes("imagenet")
    assert names is not None
    assert (len(names), names[:2]) == (1000, ["tench", "goldfish"]) if isinstance(names, list) else False


def test_templates_from_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\ufeffa photo of a {}.\nthe {c}, from above\n")
    (tmp_path / "t.json").write_text('["{} on paper"]')
    assert read_templates(str(tmp_path / "t.txt")) == ("a photo of a {}.", "the {c}, from above")
    assert read_templates(str(tmp_path / "t.json")) == ("{} on paper",)
    assert read_templates("one {} alone") == ("one {} alone",)
    assert [fill(t, "{}x") for t in ("a {}", "a {c} {d}")] == ["a {}x", "a {}x {d}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "templates=.*: no such file; expected openai80, a text with {} in it, or a file with one a line; check"),
        ("a {}\nb\n", "line 2: 'b' has no place for the class name; expected {} in it; put it"),
        ("a {}\n\nb {}\n", "line 2 is empty; .*fill or remove it"),
        ("", "line 1 is empty"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_templates(str(tmp_path / "t.txt"))


@pytest.mark.parametrize("content", ['{"a": 1}', '["a", 2]', "3", "{"])
def test_json_of_anything_but_texts_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes=.*c.json.*(expected a list of texts or an object|not JSON)"):
        read_classes(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["red", "dark_blue"], None, (["dark blue", "red"], {"dark_blue": 0, "red": 1})),
        ([2, 0], ["a", "b", "c"], (["a", "b", "c"], {0: 0, 2: 2})),
        (["b", "a"], ["c", "b", "a"], (["c", "b", "a"], {"a": 2, "b": 1})),
        (["n02", "n01"], ["tench", "shark"], (["tench", "shark"], {"n01": 0, "n02": 1})),
        (["n02"], {"n01": "tench", "n02": "shark"}, (["tench", "shark"], {"n02": 1})),
        ([7], {"5": "tench", "7": "shark"}, (["tench", "shark"], {7: 1})),
        (
            ["baseball_field", "cat", "Dog", "fire-truck"],
            ["fire truck", "dog", "cat", "Baseball Field"],
            (
                ["fire truck", "dog", "cat", "Baseball Field"],
                {"Dog": 1, "baseball_field": 3, "cat": 2, "fire-truck": 0},
            ),
        ),
        # Polish and polish: what is spelled exactly so is meant
        (["Polish", "polish"], ["polish", "Polish", "x"], (["polish", "Polish", "x"], {"Polish": 1, "polish": 0})),
    ],
    ids=["own", "numbers", "names", "sorted", "map", "map of numbers", "spelled otherwise", "both spellings"],
)
def test_labels_find_their_names(labels: list, names: Any, expected: Any) -> None:
    assert match_names(entries(*labels), names, "x") == expected


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1], None, r"x numbers its classes \(line 1: 0\) and class names are missing; .*give classes=FILE"),
        (
            [0, 3],
            ["a", "b"],
            "line 2: label 3 is out of range; the classes file has 2 classes, expected a number from 0",
        ),
        (["n1", "n2", "n3"], ["a", "b"], r"x has 3 labels \('n1', …\) and the classes file 2 names; expected as many"),
        (
            ["airport", "bareland", "beach"],
            ["beach", "bare land", "airport"],
            r"x: 1 of 3 labels has no class name \('bareland'\); the classes file has 3 names, and 2 labels are among "
            r"them; expected all .*mend the spelling, or give a JSON file .*Did you mean 'bare land'",
        ),
        (["a b", "a_b", "c"], ["A-B", "c", "d"], r"x: 2 of 3 labels have no class name \('a b', 'a_b'\)"),
        (["POLISH", "c"], ["polish", "Polish", "c"], r"x: 1 of 2 labels has no class name \('POLISH'\)"),
        (["n1", "n22"], {"n1": "a", "n2": "b"}, "1 of 2 labels have no class name .first: 'n22'.*Did you mean 'n2'"),
    ],
)
def test_a_label_without_a_name_is_an_error(labels: list, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_names(entries(*labels), names, "x")


def test_names_from_files(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("red boat\nblue boat\n")
    (tmp_path / "c.json").write_text(json.dumps({"n1": "red"}))
    assert read_classes(str(tmp_path / "c.txt")) == ["red boat", "blue boat"]
    assert read_classes(str(tmp_path / "c.json")) == {"n1": "red"}
    assert read_classes(None) is None
