"""Two processes of which one or both run out of memory end as two that had smaller pieces from the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_distributed import ROOT, torchrun
from tests.test_engines import FSDP2

ENGINES: dict[str, dict[str, str]] = {"ddp": {}, "fsdp2": FSDP2}


@pytest.fixture(scope="module")
def results(tiny_text: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {engine: tmp_path_factory.mktemp(engine) for engine in ENGINES}
    for engine, variables in ENGINES.items():
        torchrun(2, ROOT / "tests" / "hungry_run.py", tiny_text, pictures, folders[engine], **variables)
    return folders


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_do_the_step_again(results: dict[str, Path], engine: str, where: str) -> None:
    small, shrunk = (load_file(results[engine] / name / "adapter.safetensors") for name in ("small", where))
    assert small.keys() == shrunk.keys()
    assert all(torch.equal(shrunk[name], tensor) for name, tensor in small.items())
    refusals = json.loads((results[engine] / where / "refusals.json").read_text())
    assert refusals == ([[4], [4]] if engine == "fsdp2" else [[], [4]])


def test_where_the_others_cannot_be_told_it_says_so(results: dict[str, Path]) -> None:
    told = (results["fsdp2"] / "alone.1").read_text()
    assert told.startswith("step 1 ran out of memory on rank 1 alone, with 4 pairs at once, and the other ranks wait")
    assert told.endswith("go on from the last state with --resume, with --micro_batch 2")
