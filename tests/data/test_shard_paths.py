"""What `--data` names when it names tars, and what is said when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import braceexpand
import pytest

from lilt.data import is_shards, shard_paths
from lilt.data.shard_paths import expand_braces


@pytest.mark.parametrize(
    "pattern",
    [
        "x.tar",
        "s/{00000..00012}.tar",
        "{0..3}.tar",
        "{8..11}.tar",
        "{08..11}.tar",
        "{a,b}/{1..2}.tar",
        "{a,}.tar",
        "{7..7}",
    ],
)
def test_braces_are_those_of_webdataset(pattern: str) -> None:
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["{0..3.tar", "0..3}.tar", "{a,{1..2}}.tar", "}{"])
def test_braces_that_do_not_close_or_are_nested_are_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read the braces of .*; expected \{00000..01234\} or \{a,b\}"):
        expand_braces(pattern)


@pytest.mark.parametrize("pattern", ["{5..1}.tar", "{}.tar", "{a}.tar", "{1...3}.tar", "{a..c}.tar"])
def test_braces_that_say_nothing_are_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read \{.*\} in .*; expected \{00000..01234\}, counting up, or"):
        expand_braces(pattern)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def test_a_pattern_a_file_and_a_folder_name_their_tars_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "2.tar", "0.tar", "1.tar", "1.tar.index", "3.tar.tmp", "notes.txt")
    three = [tmp_path / f"{i}.tar" for i in range(3)]
    assert shard_paths(f"{tmp_path}/{{0..2}}.tar") == three
    assert shard_paths(str(tmp_path)) == three
    assert shard_paths(f"{tmp_path}/1.tar") == [three[1]]
    assert shard_paths(f"{tmp_path}/{{2,0}}.tar") == [three[2], three[0]]


@pytest.mark.parametrize(("data", "yes"), [("a.tar", True), ("a.tgz", True), ("a.jsonl", False), ("a", False)])
def test_tars_are_told_from_manifests(data: str, yes: bool) -> None:
    assert is_shards(data) == yes


def test_a_missing_shard_is_named_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar", "2.tar")
    with pytest.raises(ValueError, match=r"1.tar does not exist \(2 of 4 shards do not\); expected every file"):
        shard_paths(f"{tmp_path}/{{0..3}}.tar")


def test_a_folder_without_tars_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds 0 .tar of 1; expected all of a set; finish packing them with lilt shards"
    ):
        shard_paths(str(tmp_path))


def test_a_folder_that_is_not_wholly_packed_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "00000.tar", "00001.tar")
    (tmp_path / "shards.json").write_text(json.dumps({"shards": 5}))
    with pytest.raises(ValueError, match=r"holds 2 .tar of 5; expected all of a set; finish packing"):
        shard_paths(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.tar.gz", "a.tar.gz is compressed; expected plain .tar, which can be read at any place; unpack it"),
        ("a{0..3}.tgz", "is compressed; expected plain .tar"),
        ("https://somewhere/{0..9}.tar", "is not a local path; shards are read at random places.*copy them"),
        ("pipe:cat a.tar", "is not a local path"),
        ("s3://bucket/0.tar", "is not a local path"),
    ],
)
def test_what_cannot_be_read_at_any_place_is_an_error(data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_paths(data)


def test_a_shard_named_twice_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar")
    with pytest.raises(ValueError, match="names a shard twice; expected each once"):
        shard_paths(f"{tmp_path}/{{0,0}}.tar")
