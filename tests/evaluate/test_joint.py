"""Tasks on two processes, with uneven shards and images that cannot be read, are tasks on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lilt import DualEncoder
from tests.evaluate import joint_tasks
from tests.evaluate.conftest import manifest
from tests.test_distributed import ROOT, torchrun


def test_two_ranks_find_what_one_finds(tuned: DualEncoder, pictures: Path, tmp_path: Path) -> None:
    run = tuned.save(tmp_path / "run")
    records = [json.loads(line) for line in (pictures / "manifest.jsonl").read_text().splitlines()]
    # 11 train, 6 val and 7 test images, one of them missing
    records = [r for r in records if r["image"] != "red1.jpg"]
    for record in records:  # what is tested is not learned, and all splits have the same captions
        if record["split"] == "train":
            record["captions"] = [f"the {caption}" for caption in record["captions"]]
    records.append({"image": "red9.png", "captions": ["a red picture"], "split": "test"})
    data = manifest(tmp_path / "x.jsonl", records)
    joint_tasks.main(str(run), data, str(pictures), str(tmp_path))
    torchrun(2, ROOT / "tests" / "evaluate" / "joint_tasks.py", run, data, pictures, tmp_path)
    alone, *both = (json.loads((tmp_path / f"tasks.{name}.json").read_text()) for name in ("1.0", "2.0", "2.1"))
    assert list(alone) == list(joint_tasks.SPECS)
    for spec, expected in alone.items():
        assert expected["error"] is None, expected
        for found in both:
            assert found[spec]["values"] == pytest.approx(expected["values"], abs=1e-4), spec
    knn, zeroshot = (alone[spec]["values"] for spec in joint_tasks.SPECS[::2][:2])
    assert (knn["num_train"], knn["num_test"], knn["num_unreadable"]) == (11, 6, 1)
    assert zeroshot["num_images"] == 17


def test_the_command_on_two_processes_prints_once(tuned: DualEncoder, pictures: Path, tmp_path: Path) -> None:
    run = tuned.save(tmp_path / "run")
    words = ["evaluate", run, f"--data={pictures / 'manifest.jsonl'}", "--workers=0", "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lilt"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    spec = f"--task=knn(k=3,{joint_tasks.BY_NAME})"
    command = [str(word) for word in (*launch, *words, spec, "--task=retrieval")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)["tasks"]
    assert [values["num_unreadable"] for values in found.values()] == [0, 0]
    assert found["retrieval"]["num_images"] == 6
