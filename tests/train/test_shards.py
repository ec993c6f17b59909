"""Training on shards is exact: resumed anywhere, and where one buffer holds all of them, the run of the manifest."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lilt import checkpoint
from lilt.cli import main
from lilt.data import Sample, pack, read_manifest, select
from lilt.train import read_metrics
from tests.test_distributed import ROOT, torchrun
from tests.train.conftest import Finished, Run, interrupt_at

# dropout in both towers, augmentation, a caption drawn anew in each epoch
NOISY: dict[str, Any] = {"policy": "lora(r=2)", "epochs": 4, "batch_size": 5, "augment": "crop(0.4,1)+hflip"}


@pytest.fixture(scope="module")
def samples(pictures: Path) -> list[Sample]:
    return select(read_manifest(pictures / "manifest.jsonl"), "train")


@pytest.fixture(scope="module")
def folder(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 5, 5 and 2 samples."""
    target = tmp_path_factory.mktemp("shards")
    pack(samples, target, per_shard=5)
    return target


@pytest.fixture
def shards(settings: dict[str, Any], folder: Path, pictures: Path) -> dict[str, Any]:
    vision = f"{settings['vision']}?proj_drop_rate=0.2"
    return NOISY | {"vision": vision, "data": str(folder), "val_data": str(pictures / "manifest.jsonl")}


def same(one: Finished, other: Finished) -> bool:
    """Say whether two runs ended in the same bits, having lost the same on the way."""
    files = [load_file(r.folder / checkpoint.ADAPTER) for r in (one, other)]
    last = [r.model.trained() for r in (one, other)]
    losses = [[(r["step"], r["loss"]) for r in read_metrics(x.folder) if "loss" in r] for x in (one, other)]
    assert losses[0]
    return losses[0] == losses[1] and all(
        torch.equal(a[name], b[name]) for a, b in (files, last) for name in a.keys() | b.keys()
    )


@pytest.mark.parametrize(
    ("step", "workers", "options"),
    [
        (1, 0, {"shuffle_buffer": 4}),
        (3, 2, {"shuffle_buffer": 4}),
        (5, 0, {"shuffle_buffer": 7, "captions": "all"}),
        (4, 1, {"shuffle_buffer": 4, "resample": True}),
        (2, 0, {}),
    ],
    ids=str,
)
def test_stop_and_resume_ends_in_the_same_bits(
    run: Run, shards: dict[str, Any], step: int, workers: int, options: dict[str, Any]
) -> None:
    whole = run("whole", **shards, **options)
    first = run("parts", wish=interrupt_at(step), workers=workers, **shards, **options)
    assert not first.outcome.finished
    assert first.outcome.place.step == step
    second = run("parts", resume=True, workers=workers, **shards, **options)
    assert second.outcome.finished
    assert same(whole, second)


def test_the_comparison_can_see_another_order(run: Run, shards: dict[str, Any]) -> None:
    runs = [run(str(buffer), **shards, shuffle_buffer=buffer) for buffer in (4, 7)]
    assert not same(*runs)


def test_where_one_buffer_holds_all_it_is_the_run_of_the_manifest(run: Run, shards: dict[str, Any]) -> None:
    packed = run("shards", **shards)
    loose = run("manifest", **{**shards, "data": shards["val_data"]})
    assert same(packed, loose)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_broken_is_counted_once_and_never_trained_on(
    run: Run, shards: dict[str, Any], folder: Path, tmp_path: Path, workers: int
) -> None:
    target = tmp_path / "torn"
    target.mkdir()
    with tarfile.open(folder / "00000.tar") as old, tarfile.open(target / "0.tar", "w") as new:
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == "000000001.jpg":
                content = content[: len(content) // 2]
            if member.name != "000000003.json":
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    whole = (folder / "00001.tar").read_bytes()
    with tarfile.open(folder / "00001.tar") as old:
        last = old.getmembers()[-1]
    (target / "1.tar").write_bytes(whole[: last.offset_data])  # its last caption is torn off
    options = {**shards, "data": str(target), "max_bad_share": 0.5, "workers": workers, "shuffle_buffer": 4}
    done = run("run", **options)
    listed = {line["image"] for line in map(json.loads, (done.folder / "bad_images.jsonl").read_text().splitlines())}
    expected = {f"{target / '0.tar'}:000000001", f"{target / '0.tar'}:000000003"}
    assert listed == expected | {str(target / "1.tar"), f"{target / '1.tar'}:000000009"}
    assert done.outcome.bad_images == 4
    run("parts", wish=interrupt_at(2), **options)
    parts = run("parts", resume=True, **options)
    assert same(done, parts)
    assert parts.outcome.bad_images == 4
    with pytest.raises(ValueError, match=r"4 of 10 training images could not be read, more than max_bad_share=0.2"):
        run("strict", **{**options, "max_bad_share": 0.2, "log_every": 2})


def test_the_commands_pack_train_and_evaluate(
    settings: dict[str, Any], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, target = pictures / "manifest.jsonl", tmp_path / "shards"
    assert main(["shards", f"--data={manifest}", f"--output={target}", "--per_shard=5"]) == 0
    words = [f"--data={target}/{{00000..00002}}.tar", f"--output={tmp_path / 'run'}", "--batch_size=6"]
    words += [f"--{name}={value}" for name, value in settings.items()]
    words += ["--max_steps=2", "--workers=0", "--shuffle_buffer=6"]
    assert main(["train", *words]) == 2
    assert "give it with --val_data" in " ".join(capsys.readouterr().err.split())
    assert main(["train", *words, f"--val_data={manifest}"]) == 0
    assert "mean recall" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--workers=0"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 6


def test_two_ranks_train_as_one_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # without the packed indices: each rank makes its share and finds the others
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shards").mkdir()
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, tmp_path / "shards")
    words = [f"--data={tmp_path / 'shards'}", "--val_split=none", "--test_split=none", "--shuffle_buffer=4"]
    words += ["--batch_size=4", "--max_steps=5", "--log_every=1", "--workers=0"]  # the demo's towers have no dropout
    torchrun(2, ROOT / "recipes" / "train.py", *words, f"--output={tmp_path / '2'}")
    assert len(list((tmp_path / "cache" / "lilt" / "shards").iterdir())) == 3
    assert main(["train", *words, f"--output={tmp_path / '1'}"]) == 0
    losses = [[r["loss"] for r in read_metrics(tmp_path / ranks) if "loss" in r] for ranks in "21"]
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
