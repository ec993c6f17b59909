"""Two processes do what one does on the joined batch: value, every gradient, evaluation, and a whole run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lilt import distributed
from lilt.cli import main
from lilt.losses import SAME
from lilt.train import read_metrics
from tests import joint_step

ROOT = Path(__file__).parents[1]


def torchrun(processes: int, *words: object, **variables: str) -> str:
    """Start a program in several CPU processes as the README does and return its stderr; variables: more of its
    environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    plain = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, *map(str, words)]
    done = subprocess.run(command, env=os.environ | plain | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def results(tiny_vision: str, tiny_text: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of joint_step from one process (this one) and from each of two."""
    folder = tmp_path_factory.mktemp("joint")
    joint_step.main(tiny_vision, tiny_text, str(pictures), str(folder))
    torchrun(2, ROOT / "tests" / "joint_step.py", tiny_vision, tiny_text, pictures, folder)
    return folder


@pytest.mark.parametrize("where", ["2.0", "2.1", "micro.1.0", "micro.2.0", "micro.2.1"])
@pytest.mark.parametrize("case", joint_step.CASES)
def test_value_and_every_gradient_are_those_of_the_joined_batch(results: Path, case: str, where: str) -> None:
    alone, ours = (load_file(results / f"{case}.{name}.safetensors") for name in ("1.0", where))
    assert alone.keys() == ours.keys()
    assert {"projection.text.weight", "vision.body.patch_embed.proj.weight"} <= alone.keys()
    assert ("scale.log" in alone) == (not case.startswith("hinge"))  # which compares cosines as they are
    for name, expected in alone.items():
        assert expected.isfinite().all(), name
        # attention key biases have no gradient; all others have one
        assert expected.abs().max() > (0 if ".bias" in name else 1e-6), name
        # parts of a loss are differences of larger numbers
        atol = 1e-5 if name.startswith("mean ") else 2e-6
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=atol, msg=message)


def test_the_ways_with_equal_pairs_differ(results: Path) -> None:
    losses = {same: load_file(results / f"{same}.1.0.safetensors")["mean loss"].item() for same in SAME}
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_evaluate_as_one(results: Path, rank: int) -> None:
    alone, ours = (load_file(results / f"evaluation.{where}.safetensors") for where in ("1.0", f"2.{rank}"))
    assert alone["counts"].tolist() == ours["counts"].tolist() == [1, 7, 0]
    assert torch.equal(alone["owner"], ours["owner"])
    for side in ("image", "text"):
        torch.testing.assert_close(ours[side], alone[side], rtol=0, atol=1e-5)


def test_a_run_on_two_processes_is_the_run_on_one(
    tiny_vision: str, tiny_text: str, pictures: Path, tmp_path: Path
) -> None:
    # the locked text tower is in eval mode: no dropout, whose stream belongs to a rank
    options = {
        "vision": tiny_vision, "text": tiny_text, "vision_policy": "layernorm", "text_policy": "frozen",
        "projection": "linear(dim=16)", "data": pictures / "manifest.jsonl", "batch_size": 6, "max_steps": 3,
        "log_every": 1, "workers": 0, "test_split": "none",
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]
    assert main(["train", *words, f"--output={tmp_path / '1'}"]) == 0
    said = torchrun(2, ROOT / "recipes" / "train.py", *words, f"--output={tmp_path / '2'}")
    assert "Warning" not in said, said
    one, two = ([r["loss"] for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("1", "2"))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-4)
    adapters = [load_file(tmp_path / n / "adapter.safetensors") for n in ("1", "2")]
    for name, expected in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], expected, rtol=0, atol=1e-4)


def test_one_process_needs_no_group() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    here = torch.ones(2, requires_grad=True)
    assert distributed.gather(here) is here
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.mean(here) is here
    distributed.barrier()


def test_the_launcher_tells_who_writes_before_the_group_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not distributed.is_main()


@pytest.mark.parametrize(("variables", "all_cores"), [({"ACCELERATE_MIXED_PRECISION": "no"}, True), ({}, False)])
def test_a_lone_process_of_accelerate_launch_uses_all_cores(variables: dict[str, str], all_cores: bool) -> None:
    code = "import torch; from lilt import distributed; distributed.use_all_cores(); print(torch.get_num_threads())"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment = {**plain, "OMP_NUM_THREADS": "1", **variables}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(out.stdout) == (expected if all_cores and not torch.accelerator.is_available() else 1)


def test_a_program_leaves_its_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    assert main(["policies"]) == 0
    assert not torch.distributed.is_initialized()
