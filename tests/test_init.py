"""A run that starts from another: its tensors, its provenance, what does not fit, and what resume makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lilt
from lilt import DualEncoder, checkpoint
from lilt.cli import main
from lilt.config import ModelConfig
from lilt.train import read_metrics

Words = list[str]


@pytest.fixture
def words(tiny_vision: str, tiny_text: str, pictures: Path) -> Words:
    """What is the same in both runs."""
    return [
        "train", f"--vision={tiny_vision}", f"--text={tiny_text}", "--projection=linear(dim=16)", "--policy=lilt",
        f"--data={pictures / 'manifest.jsonl'}", "--batch_size=6", "--workers=0", "--log_every=1",
    ]  # fmt: skip


@pytest.fixture
def first(words: Words, tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    assert main([*words, "--max_steps=3", f"--output={folder}"]) == 0
    return folder


def refused(capsys: Any, argv: Words) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    return " ".join(capsys.readouterr().err.split())


def test_it_starts_where_the_other_ended(words: Words, first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    assert main([*words, "--max_steps=2", f"--init={first}", f"--output={folder}", "--augment=none"]) == 0
    lines = read_metrics(folder)
    before = next(r["result"] for r in lines if r.get("split") == "test" and r["step"] == 0)
    after = next(r["result"] for r in reversed(read_metrics(first)) if r.get("split") == "test")
    assert before == after  # measured on the same test split
    contract, theirs = (json.loads((f / "lilt.json").read_text()) for f in (folder, first))
    assert contract["init"] == str(first)
    assert "init" not in theirs
    assert next(r for r in lines if r.get("split") == "init")["adapter_sha256"] == theirs["adapter_sha256"]
    # what is saved is relative to the base towers: it loads without the run that it came from
    shutil.rmtree(first)
    model = lilt.load(folder)
    with model.disabled():
        base = model.embed(texts=["a red picture"])["text"]
    fresh = DualEncoder.build(**{s: contract["model"][s] for s in ("vision", "text", "policy", "projection")})
    fresh.core.projection.load_state_dict(model.core.projection.state_dict())
    assert torch.equal(base, fresh.embed(texts=["a red picture"])["text"])


def test_the_first_step_is_from_its_tensors(words: Words, first: Path, tmp_path: Path) -> None:
    """At a rate of next to nothing they stay what they were."""
    folder = tmp_path / "second"
    still = ["--lr=1e-12", "--head_lr=1e-12", "--max_steps=1", "--weight_decay=0"]
    assert main([*words, *still, f"--init={first}", f"--output={folder}"]) == 0
    ours, theirs = (load_file(f / checkpoint.ADAPTER) for f in (folder, first))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-7)
    fresh = load_file(DualEncoder.build(**_built(first)).save(tmp_path / "fresh") / checkpoint.ADAPTER)
    assert any(not torch.allclose(ours[name], fresh[name], atol=1e-4) for name in ours)


def _built(folder: Path) -> dict[str, Any]:
    model = json.loads((folder / "lilt.json").read_text())["model"]
    return {key: model[key] for key in ("vision", "text", "policy", "projection")}


def test_resume_does_not_load_it_again(words: Words, first: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [*words, "--max_steps=4", f"--init={first}", "--keep_states=9", "--eval_every=0.5"]
    assert main([*more, f"--output={whole}"]) == 0
    assert main([*more, f"--output={parts}"]) == 0
    for state in sorted((parts / "state").iterdir())[2:]:
        shutil.rmtree(state)  # as if it had been stopped after the second step
    shutil.rmtree(first)
    assert main(["train", "--config", str(parts / "config.yaml"), "--resume"]) == 0
    losses = [[r["loss"] for r in read_metrics(f) if "loss" in r] for f in (whole, parts)]
    assert losses[0] == losses[1]
    assert len([r for r in read_metrics(parts) if r.get("split") == "init"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--policy=layernorm"], r"trained with the vision policy 'lilt', this run has 'layernorm'; expected the same"),
        (["--text_policy=frozen"], r"the text policy 'lilt', this run has 'frozen'"),
        (["--projection=linear(dim=8)"], r"the projection 'linear(dim=16)', this run has 'linear(dim=8)'"),
        (["--shared=mlp"], r"the shared 'none', this run has 'mlp'"),
        (["--image_px=64"], r"the vision tower"),
        (["--vision=demo"], r"has other base weights than the checkpoint was trained on"),
        (["--loss=sigmoid"], r"misses 1 tensors (first: 'bias')"),
    ],
)
def test_what_does_not_fit_is_named(
    words: Words, first: Path, tmp_path: Path, capsys: Any, change: Words, message: str
) -> None:
    said = refused(capsys, [*words, *change, f"--init={first}", f"--output={tmp_path / 'x'}"])
    assert message in said
    assert not (tmp_path / "x").exists()


def test_a_policy_that_only_looks_alike_is_not_taken(tiny_vision: str, tiny_text: str, tmp_path: Path) -> None:
    """alpha is in no tensor: names and shapes are the same, what they do is not."""
    options: dict[str, Any] = {"vision": tiny_vision, "text": tiny_text, "projection": "linear(dim=16)"}
    run = DualEncoder.build(**options, policy="lora(r=2,alpha=4)").save(tmp_path / "run")
    other = DualEncoder.build(**options, policy="lora(r=2,alpha=8)")
    with pytest.raises(
        ValueError, match=r"the vision policy 'lora\(r=2,alpha=4\)', this run has 'lora\(r=2,alpha=8\)'"
    ):
        checkpoint.begin_from(other.core, other.config, str(run))
    same = DualEncoder.build(**options, policy="lora(2,4.0)")  # written in another way
    assert isinstance(same.config, ModelConfig)
    checkpoint.begin_from(same.core, same.config, str(run))


def test_a_folder_without_a_run_is_an_error(words: Words, tmp_path: Path, capsys: Any) -> None:
    said = refused(capsys, [*words, f"--init={tmp_path / 'none'}", f"--output={tmp_path / 'x'}"])
    assert "none holds no lilt checkpoint; expected lilt.json" in said
