"""`lilt merge`: run folders between the base towers and the tuned ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lilt
from lilt import DualEncoder, ImageContract
from lilt.cli import main
from tests.test_merge import MIXED, TEXTS, based, close, eye, same, shaken


@pytest.fixture
def embed(pictures: Path) -> Callable[[DualEncoder], dict[str, Tensor]]:
    return lambda model: model.embed(sorted(pictures.glob("*.png"))[:4], TEXTS)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must end with status 2, one message and no traceback; return the message."""
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and not said.out
    return " ".join(said.err[said.err.rindex("lilt: ") :].split())


@pytest.fixture
def run(settings: Any, tmp_path: Path) -> Path:
    """A checkpoint without a training run around it."""
    return shaken(**settings, **MIXED).save(tmp_path / "mine", {"test/mean_recall": 41.25})


def test_merge_writes_a_run_of_its_own(run: Path, embed: Any, settings: Any, capsys: Any) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert main(["merge", str(run), "--scale", "0.6", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    folder = Path(f"{run}-scale0.6")
    assert json.loads(printed) == {"run": str(run), "scale": 0.6, "output": str(folder)}
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    assert sorted(before) == sorted(file.name for file in folder.iterdir())
    assert json.loads((folder / "lilt.json").read_text())["metrics"] == {"merge/from": str(run), "merge/scale": 0.6}
    assert "| merge/scale | 0.60 |" in (folder / "README.md").read_text()
    tuned = lilt.load(run)
    assert same(embed(lilt.load(folder)), embed(tuned.interpolate(0.6)))

    base, ends = based(tuned, **settings).core.text.body.state_dict(), load_file(run / "adapter.safetensors")
    for name, tensor in load_file(folder / "adapter.safetensors").items():
        if name.startswith("text."):
            value = base[name.removeprefix("text.body.")]
            torch.testing.assert_close(tensor, value + 0.6 * (ends[name] - value), rtol=1e-6, atol=1e-7)
        elif not name.startswith("vision."):
            assert torch.equal(tensor, ends[name]), name


def test_the_ends_as_run_folders(run: Path, embed: Any, settings: Any, tmp_path: Path, capsys: Any) -> None:
    for scale in ("0", "1"):
        assert main(["merge", str(run), f"--scale={scale}", "--output", str(tmp_path / scale)]) == 0
        said = capsys.readouterr().out
        assert said.split() == f"{run} at scale {scale} is in {tmp_path / scale}".split()
    assert same(load_file(tmp_path / "1" / "adapter.safetensors"), load_file(run / "adapter.safetensors"))
    model = lilt.load(tmp_path / "0")
    assert close(embed(model), embed(based(lilt.load(run), **settings)), 1e-6)


def test_nothing_is_overwritten_unasked(run: Path, capsys: Any) -> None:
    folder = Path(f"{run}-scale0.5")
    assert main(["merge", str(run), "--scale=0.5"]) == 0
    before = (folder / "lilt.json").read_bytes()
    capsys.readouterr()
    said = refused(capsys, "merge", str(run), "--scale=0.25", f"--output={folder}")
    assert "already holds a checkpoint; nothing was written: pass --overwrite or another --output" in said
    assert (folder / "lilt.json").read_bytes() == before
    assert main(["merge", str(run), "--scale=0.25", f"--output={folder}", "--overwrite"]) == 0
    assert json.loads((folder / "lilt.json").read_text())["metrics"]["merge/scale"] == 0.25


def test_train_merge_evaluate(settings: Any, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    run, options = tmp_path / "run", {"data": pictures / "manifest.jsonl", "batch_size": 6, "max_steps": 2}
    words = [f"--{key}={value}" for key, value in (settings | options).items()]
    assert main(["train", *words, f"--output={run}", "--workers=0", "--policy=layernorm"]) == 0
    results = []
    for scale in (1, 0.5):
        assert main(["merge", str(run), f"--scale={scale}"]) == 0
        capsys.readouterr()
        assert main(["evaluate", f"{run}-scale{scale}", "--json", "--workers=0"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        assert results[-1].pop("of")["model"] == f"{run}-scale{scale}"
    assert main(["evaluate", str(run), "--json", "--workers=0"]) == 0
    found = json.loads(capsys.readouterr().out)
    of = found.pop("of")
    assert (of["policy"], of["adapter_bytes"]) == ("layernorm", (run / "adapter.safetensors").stat().st_size)
    assert found == results[0]
    assert results[1]["num_images"] == 6
    said = refused(capsys, "merge", f"{run}-scale1", "--scale=0.5", f"--output={run}", "--overwrite")
    assert "holds a training run, which merge never replaces; nothing was written: give another --output" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN"], "the following arguments are required: scale"),
        (["--scale=0.5"], "the following arguments are required: run"),
        (["/nowhere", "--scale=0.5"], "/nowhere holds no lilt checkpoint; expected lilt.json"),
        (["RUN", "--scale=1.5"], "scale=1.5 is outside the way from base to tuned; expected 0 to 1"),
        (["RUN", "--scale=half"], "scale.*float"),
        (["RUN", "--scal=0.5"], "unknown option 'scal'; lilt merge --help lists all. Did you mean 'scale'"),
    ],
)
def test_a_users_error_is_explained(run: Path, capsys: Any, argv: list[str], message: str) -> None:
    folders = sorted(run.parent.iterdir())
    assert re.search(message, refused(capsys, "merge", *(str(run) if word == "RUN" else word for word in argv)))
    assert sorted(run.parent.iterdir()) == folders


def test_a_run_on_an_own_module_is_merged_in_python(settings: Any, tmp_path: Path, capsys: Any) -> None:
    options = settings | {"vision": eye(), "preprocess": ImageContract(32)}
    run = shaken(**options, policy="layernorm").save(tmp_path / "own")
    assert "was trained on your own vision module (module:Eye)" in refused(capsys, "merge", str(run), "--scale=0.5")
