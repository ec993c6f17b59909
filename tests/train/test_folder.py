"""Each run has a folder of its own, whatever starts beside it or was left by others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from lilt.build import build_pairs, build_splits
from lilt.config import TrainConfig
from lilt.run import align
from lilt.train.agree import differences, facts_of
from lilt.train.folder import CONFIG, check_folder, new_folder, open_folder
from tests.test_distributed import ROOT, torchrun
from tests.train.conftest import Run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output=str(tmp_path / "run"))


def opened(config: TrainConfig) -> Path:
    folder = Path(config.output or "")
    open_folder(config, folder, check_folder(config, folder))
    return folder


def test_two_runs_that_start_together_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [new_folder(TrainConfig(policy="lora(r=8)")) for _ in range(3)]
    assert names == ["runs/lora_r_8", "runs/lora_r_8-2", "runs/lora_r_8-3"]
    opened(TrainConfig(output=names[0]))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_a_named_folder_that_another_run_took_meanwhile_is_refused(
    config: TrainConfig, overwrite: bool, left: bool
) -> None:
    config = replace(config, overwrite=overwrite)
    folder = Path(config.output or "")
    if left:  # by a run that ended before its first step
        opened(config)
    marks = [check_folder(config, folder) for _ in range(2)]
    open_folder(config, folder, marks[0])
    (folder / "bad_images.jsonl").touch()
    before = (folder / CONFIG).stat()
    with pytest.raises(ValueError, match=r"was taken by another run .*; expected a folder of its own; .*another --out"):
        open_folder(config, folder, marks[1])
    assert (folder / "bad_images.jsonl").exists()
    assert (folder / CONFIG).stat().st_mtime_ns == before.st_mtime_ns


def test_a_folder_with_metrics_of_another_run_is_refused(config: TrainConfig) -> None:
    folder = Path(config.output or "")
    mark = check_folder(config, folder)
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="was taken by another run"):
        open_folder(config, folder, mark)
    assert [file.name for file in folder.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_fails_before_it_wrote_leaves_no_folder(
    settings: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = settings | {"data": str(pictures / "manifest.jsonl"), "train_split": "no such"}
    (tmp_path / "mine").mkdir()
    for output in (None, "mine"):
        with pytest.raises(ValueError, match="no such"):
            align(TrainConfig(**{**plain, "output": output}), Console(quiet=True))
    assert not list((tmp_path / "runs").iterdir())
    assert (tmp_path / "mine").is_dir()


def test_a_run_that_is_older_than_a_setting_had_its_default(config: TrainConfig) -> None:
    file = opened(config) / CONFIG
    then = asdict(config)
    file.write_text(yaml.safe_dump({name: then[name] for name in then if name not in ("spill", "same")}))
    again = replace(config, resume=True)
    for spill in ("auto", "disk"):
        check_folder(replace(again, spill=spill), file.parent)
    with pytest.raises(ValueError, match="was started with same=positive, not ignored; go on with its own"):
        check_folder(replace(again, same="ignored"), file.parent)


@pytest.mark.parametrize(("then", "now", "free"), [(None, 4, True), (8, 4, True), (4, 8, False), (8, None, False)])
def test_a_run_may_go_on_with_smaller_pieces(
    config: TrainConfig, then: int | None, now: int | None, free: bool
) -> None:
    """As one does by itself that runs out of memory; not with larger ones, for which there may be no place."""
    folder = opened(replace(config, micro_batch=then))
    again = replace(config, resume=True, micro_batch=now)
    if free:
        check_folder(again, folder)
        return
    with pytest.raises(ValueError, match=f"was started with micro_batch={then}, not {now}; go on with its own"):
        check_folder(again, folder)


def test_ranks_may_spill_to_other_places(run: Run) -> None:
    done = run(max_steps=1)
    dataset, _ = build_pairs(done.config, done.model, build_splits(done.config).train)
    told = [facts_of(replace(done.config, spill=spill), done.model, dataset) for spill in ("auto", "disk")]
    assert differences(told) == ""
    other = facts_of(replace(done.config, lr=1.0), done.model, dataset)
    assert "--lr 1.0" in differences([*told, other])


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_spilled_goes_and_nothing_else(config: TrainConfig, resume: bool) -> None:
    folder = opened(config)
    kept = ["spill-1/0.bin", "spill-1/notes.txt", "spill-2/0.bin/0.bin", "spill-3", "other/0.bin"]
    for name in ("spill-0/0.bin", "spill-0/12.bin", *kept):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    opened(replace(config, resume=resume, overwrite=not resume))
    assert not (folder / "spill-0").exists()
    assert all((folder / name).exists() for name in kept)


def test_ranks_share_a_folder_and_wait_until_it_is_ready(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (CONFIG, "metrics.jsonl", "bad_images.jsonl"):
        (tmp_path / "run" / name).touch()
    torchrun(2, ROOT / "tests" / "train" / "folder_run.py", tmp_path)
    seen = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in range(2)]
    assert seen[0] == seen[1]
    assert seen[0]["names"] == ["runs/bitfit", "runs/bitfit-2"]
    assert seen[0]["overwrite"] == seen[0]["resume"] == [CONFIG]
    assert "mine was taken by another run" in seen[0]["taken"]
