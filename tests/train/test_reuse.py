"""Training from what frozen parts gave once: the same model as without, fewer forwards, nothing trusted unasked."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from lilt.data import dataset as dataset_module
from lilt.data import hub, read_image
from lilt.data import store as store_module
from lilt.towers.front import Front
from lilt.train import Trainer
from lilt.train.reuse import Reuse
from tests.train.conftest import Finished, Run, interrupt_at

# what trains behind a front, in one tower or both; the text tower has dropout of 0.1
POLICIES = {
    "frozen": {"vision", "text"},
    "lit": {"vision"},
    "lit_mirror": {"text"},
    "last(1)": {"vision", "text"},
    "layernorm(blocks=last:1)+lora(r=2,blocks=last:1)": {"vision", "text"},
    "deep_adapter": {"vision", "text"},
}
TEACHER = "timm:test_vit?pretrained=false&image_px=32"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lilt" / "reuse"


def plain(run: Run, name: str, **options: Any) -> Finished:
    settings = {"augment": "none", "epochs": 3, "eval_every": 3, "lr": 0.01}
    return run(name, **{**settings, **options})


def same(one: Finished, other: Finished, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    left, right = one.model.trained(), other.model.trained()
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_trained_tensors_are_those_without_reuse(run: Run, policy: str, micro_batch: int | None) -> None:
    options = {"policy": policy, "micro_batch": micro_batch}
    off = plain(run, "off", reuse="off", **options)
    stores: list[Any] = []
    for reuse in ("memory", "disk", "auto"):
        on = plain(run, reuse, reuse=reuse, wish=lambda trainer: stores.append(trainer.collate.stores), **options)
        assert stores[-1].keys() == POLICIES[policy]
        same(off, on)
    began = start(run, policy)
    assert any(not torch.equal(p, began[n]) for n, p in off.model.trained().items())


def start(run: Run, policy: str) -> dict[str, Tensor]:
    """Return the trained tensors as they were before training."""
    found: dict[str, Tensor] = {}

    def look(trainer: Trainer) -> None:
        found.update({n: p.detach().clone() for n, p in trainer.core.trained().items()})

    plain(run, "start", policy=policy, max_steps=1, reuse="off", wish=look)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_half_precision_it_is_nearly_the_same(run: Run, dtype: str) -> None:
    options = {"policy": "last(1)", "lr": 1e-4, "head_lr": 1e-4}
    off = plain(run, "off", reuse="off", **options)
    on = plain(run, "on", reuse="disk", reuse_dtype=dtype, **options)
    # Adam's first steps are of the size of the rate whatever the gradient: a handful of them bounds the distance
    same(off, on, rtol=0, atol=1e-3)


def test_images_are_opened_once_and_the_front_is_run_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def look(source: Any, *more: Any) -> Any:
        opened.append(str(source))
        return read_image(source, *more)

    monkeypatch.setattr(dataset_module, "read_image", look)
    plain(run, "one", policy="frozen", reuse="disk", val_split="none")
    assert len(opened) == 12 + 8  # the first eight are looked at before
    opened.clear()
    plain(run, "two", policy="frozen", reuse="disk", val_split="none", seed=1)
    assert len(opened) == 8  # found on disk


def test_only_what_a_killed_run_left_open_is_computed(run: Run, cache: Path) -> None:
    plain(run, "one", policy="frozen", reuse="disk")
    (file,) = (file for file in cache.glob("*/known.bin") if file.stat().st_size == 12)  # of the images
    torch.from_file(str(file), shared=True, size=12, dtype=torch.bool)[3:5] = False
    rows: list[int] = []

    def count(trainer: Trainer) -> None:
        front = trainer.learner.fronts["vision"]
        record = front.record

        def counted(inputs: Any) -> Tensor:
            rows.append(len(inputs))
            return record(inputs)

        object.__setattr__(front, "record", counted)

    plain(run, "two", policy="frozen", reuse="disk", wish=count)
    assert rows == [8, 8, 2]  # two looks at the first eight, and the two that were missing


@pytest.mark.parametrize("reuse", ["memory", "disk"])
def test_fixed_views_are_the_same_with_and_without(run: Run, reuse: str) -> None:
    options = {"policy": "frozen", "augment": "crop(0.3,1)+hflip", "views": 3, "epochs": 6}
    same(plain(run, "off", reuse="off", **options), plain(run, "on", reuse=reuse, **options))
    other = plain(run, "free", reuse="off", **{**options, "views": None})
    with pytest.raises(AssertionError):
        same(plain(run, "again", reuse=reuse, **options), other)


@pytest.mark.parametrize("policy", ["frozen", "layernorm"])
def test_a_teacher_is_asked_once(run: Run, policy: str) -> None:
    options = {"policy": policy, "teacher": TEACHER, "distill": "mse", "augment": "crop(0.3,1)", "views": 2}
    off = plain(run, "off", reuse="off", **options)
    stores: list[Any] = []
    on = plain(run, "on", reuse="memory", wish=lambda t: stores.append(t.collate.stores), **options)
    assert stores[0].keys() == ({"vision", "text", "teacher"} if policy == "frozen" else {"teacher"})
    same(off, on)


def test_stop_and_resume_ends_in_the_same_bits(run: Run) -> None:
    options: dict[str, Any] = {"policy": "last(1)", "reuse": "disk", "epochs": 4}
    whole = plain(run, "whole", **options)
    plain(run, "stopped", wish=interrupt_at(3), **options)
    again = plain(run, "stopped", resume=True, **options)
    same(whole, again, rtol=0, atol=0)


def test_bad_images_are_listed_and_left_out(run: Run, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(pictures, folder)
    (folder / "red0.png").write_bytes(b"no picture")
    options = {"policy": "frozen", "data": str(folder / "manifest.jsonl"), "max_bad_share": 0.5}
    off = plain(run, "off", reuse="off", **options)
    for reuse in ("memory", "disk", "disk"):  # the last finds the rows of the one before
        on = plain(run, f"{reuse}", reuse=reuse, overwrite=True, **options)
        same(off, on)
        lines = (on.folder / "bad_images.jsonl").read_text().splitlines()
        assert [Path(json.loads(line)["image"]).name for line in lines] == ["red0.png"]


def test_it_starts_though_the_first_images_cannot_be_read(run: Run, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(pictures, folder)
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    first = [line["image"] for line in lines if line.get("split", "train") == "train"][:8]
    for name in first:
        (folder / name).write_bytes(b"no picture")
    options = {"policy": "frozen", "data": str(folder / "manifest.jsonl"), "max_bad_share": 0.9}
    on = plain(run, "on", reuse="memory", **options)
    same(plain(run, "off", reuse="off", **options), on)
    found = [json.loads(line)["image"] for line in (on.folder / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(Path(name).name for name in found) == sorted(Path(name).name for name in first)
    for line in lines:
        (folder / line["image"]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the \d+ images of the training set can be read; .*image_root"):
        plain(run, "none", reuse="auto", **options)


def test_a_changed_picture_is_computed_anew(run: Run, pictures: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(pictures, folder)
    options = {"policy": "frozen", "data": str(folder / "manifest.jsonl")}
    plain(run, "one", reuse="disk", **options)
    before = set(cache.iterdir())
    Image.new("RGB", (41, 40), (1, 2, 3)).save(folder / "red0.png")
    same(plain(run, "off", reuse="off", **options), plain(run, "two", reuse="disk", **options))
    assert len(set(cache.iterdir()) - before) == 1  # the captions are the same


def table(folder: Path, pictures: Path, turned: bool) -> str:
    """Save the pictures of the manifest as a Hugging Face dataset, each as it is or as its neighbour's."""
    columns: dict[str, list[Any]] = {"image": [], "captions": []}
    for line in (pictures / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "train":
            columns["image"].append({"bytes": (pictures / row["image"]).read_bytes(), "path": None})
            columns["captions"].append(row["captions"])
    if turned:
        columns["image"] = columns["image"][1:] + columns["image"][:1]
    shutil.rmtree(folder, ignore_errors=True)
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(folder)
    hub._open.cache_clear()  # as in a later process
    return f"hf:{folder}"


def test_a_dataset_saved_again_is_computed_anew(run: Run, pictures: Path, tmp_path: Path, cache: Path) -> None:
    options: dict[str, Any] = {"policy": "frozen", "val_split": "none", "test_split": "none"}
    data, kept = table(tmp_path / "table", pictures, turned=False), []
    for name in ("one", "two", "turned"):
        if name == "turned":
            table(tmp_path / "table", pictures, turned=True)
        on = plain(run, name, reuse="disk", data=data, **options)
        same(plain(run, f"{name}_off", reuse="off", data=data, **options), on)
        kept.append(len(list(cache.iterdir())))
    assert kept == [2, 2, 3]  # images and captions, then what is there, then other images of the same captions


@pytest.mark.parametrize("side", ["text", "vision", "teacher"])
def test_a_changed_setting_of_a_tower_is_computed_anew(
    run: Run, side: str, tiny_text: str, tiny_vision: str, tmp_path: Path, cache: Path
) -> None:
    source, _, there = (tiny_text if side == "text" else tiny_vision).partition(":")
    folder = tmp_path / "tower"
    shutil.copytree(there, folder)
    options: dict[str, Any] = {"policy": "frozen", side: f"{source}:{folder}"}
    if side == "teacher":
        options["distill"] = "mse"
    plain(run, "one", reuse="disk", **options)
    before = set(cache.iterdir())
    settings = json.loads((folder / "config.json").read_text())
    if side == "text":
        settings["hidden_act"] = "relu"
    else:
        settings["model_args"]["act_layer"] = "relu"
    (folder / "config.json").write_text(json.dumps(settings))
    same(plain(run, "off", reuse="off", **options), plain(run, "two", reuse="disk", **options))
    assert len(set(cache.iterdir()) - before) == 1


@pytest.mark.parametrize("policy", ["last(1)", "layernorm(blocks=last:1)+lora(r=2,blocks=last:1)"])
def test_policies_with_the_same_front_share_its_rows(run: Run, policy: str, cache: Path) -> None:
    plain(run, "one", policy="bitfit(blocks=last:1)", reuse="disk", max_steps=1)
    before = set(cache.iterdir())
    plain(run, "two", policy=policy, reuse="disk", max_steps=1)
    assert set(cache.iterdir()) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_auto_looks_at_what_processes_can_share(run: Run, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker gives a container 64 MiB; what does not fit half of what is free there is not put there."""
    monkeypatch.setattr("lilt.train.reuse.READ", 1.0)  # a very slow disk: memory or nothing
    usage = shutil.disk_usage
    small = SimpleNamespace(free=3000)  # 12 images are 1536 bytes, the captions more

    def look(path: Any) -> Any:
        return small if Path(path) == store_module.SHARED else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", look)
    monkeypatch.setattr(store_module, "SHARED", Path("/"))
    stores: list[Any] = []
    plain(run, "auto", policy="frozen", workers=workers, wish=lambda t: stores.append(t.collate.stores))
    assert stores[0].keys() == (set() if workers else {"vision", "text"})
    assert not any(store.rows.is_shared() for store in stores[0].values())
    small.free = 30_000
    plain(run, "more", policy="frozen", workers=workers, wish=lambda t: stores.append(t.collate.stores))
    assert stores[1].keys() == {"vision", "text"}
    assert all(store.rows.is_shared() == bool(workers) for store in stores[1].values())


def test_auto_looks_at_the_memory_of_the_container(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilt.train.reuse.READ", 1.0)
    stores: list[Any] = []
    for left in (10, 10**6):
        monkeypatch.setattr("lilt.train.reuse.available", lambda left=left: left)
        plain(run, f"of{left}", policy="frozen", wish=lambda t: stores.append(t.collate.stores))
    assert [set(found) for found in stores] == [set(), {"vision", "text"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "layernorm"},
            r"reuse=disk: no block of the text tower .*; no block of the vision .*use --reuse off",
        ),
        (
            {"policy": "layernorm", "augment": "hflip"},
            r"augment=hflip shows each image anew each time; expected .*views",
        ),
    ],
)
def test_where_nothing_is_frozen_it_says_so(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(run, "none", reuse="disk", **options)
    plain(run, "auto", reuse="auto", max_steps=1, **options)


def test_auto_stores_nothing_for_one_pass(run: Run) -> None:
    stores: list[Any] = []
    plain(run, "once", policy="frozen", epochs=1, wish=lambda t: stores.append(t.collate.stores))
    assert stores == [{}]


def test_auto_leaves_the_disk_alone_where_computing_is_quicker(
    run: Run, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr("lilt.train.reuse.MEMORY_SHARE", 0)
    monkeypatch.setattr("lilt.train.reuse.READ", 1.0)  # a very slow disk
    said: list[str] = []

    def listen(trainer: Trainer) -> None:
        monkeypatch.setattr(trainer.log, "say", said.append)

    plain(run, "slow", policy="frozen", wish=listen)
    assert sum("storing does not pay" in line for line in said) == 2
    assert not list(cache.glob("*/rows.bin"))


def test_reuse_and_front_are_what_the_trainer_has(run: Run) -> None:
    """A front is found once, where the trainer is built, and kept still."""

    def look(trainer: Trainer) -> None:
        assert isinstance(trainer.reuse, Reuse)
        assert {side: type(front) for side, front in trainer.learner.fronts.items()} == {"vision": Front, "text": Front}
        trainer.core.train()
        assert not any(m.training for m in trainer.core.vision.body.blocks[0].modules())
        assert trainer.core.vision.body.blocks[1].training

    plain(run, "look", policy="last(1)", max_steps=1, wish=look)


def test_rows_that_nobody_computed_do_not_count(run: Run) -> None:
    """Zeros in their place would be trained on: a caption here, that only another process was to store."""
    lost: list[int] = []

    def lose(trainer: Trainer) -> None:
        start = trainer.reuse.start

        def begin(dataset: Any, collate: Any) -> None:
            start(dataset, collate)
            collate.stores["text"].known[:2] = False
            batch = collate([dataset[0, unit] for unit in range(len(dataset))])
            pairs = [dataset[0, unit] for unit in range(len(dataset))]
            assert batch.valid.tolist() == [pair.text_id > 1 for pair in pairs]
            lost.append(int((~batch.valid).sum()))

        trainer.reuse.start = begin  # type: ignore[method-assign]

    plain(run, "lost", policy="lit_mirror", reuse="memory", captions="all", max_steps=2, wish=lose)
    assert lost[0] > 0


def test_code_of_ones_own_is_not_kept_on_disk(run: Run, cache: Path) -> None:
    own = {"vision": "py:tests.train.hungry:vision", "policy": "frozen"}
    with pytest.raises(ValueError, match=r"reuse=disk: nothing tells .* the same vision tower .*code of your own"):
        plain(run, "disk", reuse="disk", **own)
    plain(run, "auto", reuse="auto", **own)
