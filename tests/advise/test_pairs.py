"""Which pairs are looked at: no image twice, no caption twice, as many as were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lilt.advise import choose
from lilt.data import Sample


def samples(*captions: tuple[str, ...]) -> list[Sample]:
    return [Sample(Path(f"{i}.png"), some, "train") for i, some in enumerate(captions)]


def test_each_image_gives_a_caption_that_no_other_has() -> None:
    found = choose(samples(("a", "b"), ("a", "b"), ("a", "b"), ("c",)), 0, "here")
    assert len(found) == 3 and len(set(found.images)) == 3
    assert sorted(found.captions) == ["a", "b", "c"]


def test_case_and_spaces_make_no_other_caption() -> None:
    assert len(choose(samples(("A red  boat .",), ("a red boat .",), (" a RED boat .\n",)), 0, "here")) == 1
    assert len(choose(samples(("a red boat",), ("a red boats",)), 0, "here")) == 2


def test_an_image_of_two_splits_is_there_once() -> None:
    twice = [Sample("one.png", ("a", "b"), "train"), Sample("one.png", ("c",), "val"), Sample("two.png", ("d",), "val")]
    assert sorted(choose(twice, 0, "here").images) == ["one.png", "two.png"]


def test_a_caption_may_read_like_a_path() -> None:
    assert len(choose([Sample("boat", ("boat",), "train")], 1, "here")) == 1


def test_fewer_are_the_first_of_more_and_the_seed_decides() -> None:
    many = samples(*((f"caption {i}",) for i in range(200)))
    some, all_, other = choose(many, 20, "here"), choose(many, 0, "here"), choose(many, 20, "here", seed=1)
    assert some.images == all_.images[:20] and some.captions == all_.captions[:20]
    assert len(all_) == 200 and some.images != other.images
    assert all(Path(i).stem == c.split()[1] for i, c in zip(all_.images, all_.captions, strict=True))
    assert len(choose(samples(*((str(i),) for i in range(2100))), 0, "here")) == 2000


def test_too_few_say_what_was_expected_and_found() -> None:
    with pytest.raises(
        ValueError, match=r"pairs=3: here has 4 images; expected 3 pairs .*, found 2; give --pairs 2, or"
    ):
        choose(samples(("a",), ("a",), ("A",), ("b",)), 3, "here")
