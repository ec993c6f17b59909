import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lilt import demo
from lilt.demo.generate import cache_folder, split_scenes
from lilt.demo.lexicon import ATTRIBUTE_OF, COLOURS, SHAPES, words
from lilt.demo.scenes import HELD_OUT, IMAGE_PX

SMALL = {"train": 12, "val": 6, "test": 8}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.*"))}


def test_the_manifest_is_whole(tmp_path: Path) -> None:
    path = demo.manifest(tmp_path, **SMALL)
    found = lines(path)
    assert {split: sum(line["split"] == split for line in found) for split in SMALL} == SMALL
    assert all(len(set(line["captions"])) == 5 for line in found)
    for line in found:
        with Image.open(path.parent / line["image"]) as image:
            assert (image.size, image.mode) == ((IMAGE_PX, IMAGE_PX), "RGB")
    assert len({(path.parent / line["image"]).read_bytes() for line in found}) == len(found)


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    path = demo.manifest(tmp_path, **SMALL)
    marked = lines(path)
    os.utime(path, (1, 1))
    assert demo.manifest(tmp_path, **SMALL) == path
    assert path.stat().st_mtime == 1
    assert lines(path) == marked
    assert [file.name for file in tmp_path.iterdir()] == [path.parent.name]


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    one, same = (demo.manifest(tmp_path / name, **SMALL).parent for name in "ab")
    other = demo.manifest(tmp_path / "a", **SMALL, seed=1).parent
    assert contents(one) == contents(same)
    assert other != one and contents(other) != contents(one)


def test_processes_agree_whatever_their_hash_seed(tmp_path: Path) -> None:
    # an empty parent package: the real one imports torch, which two processes need not wait for
    code = f"""
import sys, types
from pathlib import Path
sys.modules["lilt"] = types.ModuleType("lilt")
sys.modules["lilt"].__path__ = [{str(Path(demo.__file__).parents[1])!r}]
from lilt import demo
demo.manifest(Path({str(tmp_path / "root")!r}), **{SMALL})
"""
    racing = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)})
        for seed in range(2)
    ]
    assert [process.wait(timeout=60) for process in racing] == [0, 0]
    (written,) = (tmp_path / "root").iterdir()
    assert contents(written) == contents(demo.manifest(tmp_path / "own", **SMALL).parent)


def test_who_loses_the_race_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = demo.manifest(tmp_path / "rival", **SMALL).parent
    target = tmp_path / "root" / rival.name

    def win_first(draft: Path, folder: Path) -> None:
        rival.replace(target)
        raise FileExistsError(folder)

    monkeypatch.setattr(Path, "rename", win_first)
    assert demo.manifest(tmp_path / "root", **SMALL) == target / "manifest.jsonl"
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lilt.demo.generate.captions", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.manifest(tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())


def test_held_out_combinations_are_in_every_test_scene_and_nowhere_else() -> None:
    scenes = split_scenes({"train": 4000, "val": 400, "test": 400}, seed=0)
    assert not any(scene.held_out for split in ("train", "val") for scene in scenes[split])
    assert all(scene.held_out for scene in scenes["test"])
    shown = {look for scene in scenes["test"] for look in scene.looks}
    assert shown >= HELD_OUT
    # the words of a held-out combination are known from training, only never together on one thing
    known = {look for scene in scenes["train"] for look in scene.looks}
    assert known == {(shape, colour) for shape in SHAPES for colour in COLOURS} - HELD_OUT


def test_test_captions_hold_no_word_unknown_to_training(tmp_path: Path) -> None:
    found = lines(demo.manifest(tmp_path, train=300, val=2, test=100))
    heard = {
        split: {w for li in found if li["split"] == split for c in li["captions"] for w in words(c)} for split in SMALL
    }
    assert heard["test"] <= heard["train"]
    assert heard["train"] >= ATTRIBUTE_OF.keys()


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lilt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path.home() / ".cache" / "lilt"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "lilt"


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every split needs at least one image"):
        demo.manifest(tmp_path, train=0)


def test_only_pillow_and_the_standard_library_are_imported() -> None:
    for file in Path(demo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top == "PIL" or name.startswith("lilt.demo"), f"{file}: {name}"
