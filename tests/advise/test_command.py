"""`lilt advise` as scripts of users call it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lilt.advise import Advice, ranked
from lilt.cli import main
from lilt.data import images as data_images
from lilt.evaluate import rows as reading

KEYS = [
    "vision", "text", "mutual_knn", "chance", "cka", "cka_chance", "best_vision_layer", "best_text_layer",
    "best_mutual_knn", "best_cka", "pairs", "k", "policy", "layers", "trainable", "step_flops", "step_ms", "step_cost",
    "refused",
]  # fmt: skip
TOWERS = '''
import torch
from torch import nn
from lilt.towers import ImageContract

class Eye(nn.Module):
    """Sees 8 numbers of a picture; what it does with several at once is its temper."""

    def __init__(self, temper):
        super().__init__()
        self.layers, self.temper = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 8)), temper

    def forward(self, images):
        if len(images) > 1 and self.temper == "tired":
            raise RuntimeError("not so many at once")
        seen = self.layers(images)
        return seen / 0 if len(images) > 1 and self.temper == "lost" else seen

class Ear(nn.Module):
    def __init__(self, temper):
        super().__init__()
        self.words, self.temper = nn.Embedding(256, 8), temper

    def forward(self, ids):
        if len(ids) > 1 and self.temper == "busy":
            raise KeyboardInterrupt
        if len(ids) > 1 and self.temper == "deaf":
            raise RuntimeError("cannot hear")
        return self.words(ids).mean(1)

def spell(texts):
    return torch.tensor([[ord(c) for c in text.ljust(40)[:40]] for text in texts])

def fresh(): return Eye("fresh"), ImageContract(32)
def tired(): return Eye("tired"), ImageContract(32)
def lost(): return Eye("lost"), ImageContract(32)
def other(): return Eye("fresh"), ImageContract(32, mean=(0.1, 0.1, 0.1))
def ear(): return Ear("open"), spell
def busy(): return Ear("busy"), spell
def deaf(): return Ear("deaf"), spell
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The module of towers of one's own, each with its temper."""
    (tmp_path / "tempers.py").write_text(TOWERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "py:tempers"
    sys.modules.pop("tempers", None)


@pytest.fixture
def data(pictures: Path) -> list[str]:
    return [f"--data={pictures / 'manifest.jsonl'}", "--workers=0", "--k=3"]


def listed(capsys: pytest.CaptureFixture[str], argv: list[str], status: int = 0) -> tuple[list[dict[str, Any]], str]:
    assert main(["advise", *argv, "--json"]) == status
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    return json.loads(said.out), " ".join(said.err.split())


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["advise", *argv]) == 2
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    return " ".join(said.err[said.err.rindex("lilt: ") :].split())


def test_pairs_of_towers_come_best_first(tiny_vision: str, tiny_text: str, data: list[str], capsys: Any) -> None:
    visions = [tiny_vision, f"{tiny_vision}?layers=1"]
    found, _ = listed(capsys, [*data, *(f"--vision={v}" for v in visions), f"--text={tiny_text}"])
    assert [list(row) for row in found] == [KEYS, KEYS]
    assert {row["vision"] for row in found} == set(visions)
    assert found[0]["mutual_knn"] >= found[1]["mutual_knn"]
    for row in found:
        assert (row["pairs"], row["k"], row["policy"], row["refused"]) == (12, 3, "layernorm", None)
        assert row["chance"] == pytest.approx(100 * 3 / 11)
        assert 0 <= row["mutual_knn"] <= row["best_mutual_knn"] <= 100 and 0 < row["cka"] <= 1
        best = row["layers"][0]
        best.pop("cka_chance")
        assert {key: row[f"best_{key}"] for key in best} == best
        output = next(m for m in row["layers"] if m["vision_layer"] == m["text_layer"] == "output")
        assert (output["mutual_knn"], output["cka"]) == (row["mutual_knn"], row["cka"])
        assert row["layers"] == sorted(row["layers"], key=lambda m: -m["mutual_knn"])
    whole, cut = (next(row for row in found if row["vision"] == v) for v in visions)
    assert len(whole["layers"]) == 4 and len(cut["layers"]) == 2
    assert {m["vision_layer"] for m in whole["layers"]} == {"1 of 2", "output"}
    assert whole["step_cost"] == 1 > cut["step_cost"] == cut["step_flops"] / whole["step_flops"]
    assert whole["step_ms"] > 0 and whole["trainable"] - cut["trainable"] == 4 * 32  # two norms of one block


def test_the_step_is_the_one_of_budgets(tiny_vision: str, tiny_text: str, data: list[str], capsys: Any) -> None:
    towers = [f"--vision={tiny_vision}", f"--text={tiny_text}", "--batch_size=8"]
    found, _ = listed(capsys, [*data, *towers, "--policy=lora(r=2)", "--text_tokens=16"])
    full, _ = listed(capsys, [*data, *towers, "--policy=full", "--text_tokens=16"])
    assert main(["budgets", *towers, "--policies=lora(r=2)", "--text_tokens=16", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert found[0]["trainable"] == row["trainable"]
    assert found[0]["step_flops"] / full[0]["step_flops"] == pytest.approx(row["step_flops_ratio"])


def test_the_table(tiny_vision: str, tiny_text: str, data: list[str], capsys: Any) -> None:
    assert main(["advise", *data, f"--vision={tiny_vision}", f"--text={tiny_text}", "--layers=last"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "vision text kNN % CKA by chance best layers trained step",
        "27.3,",
        "12 pairs; kNN: share of the 3",
    ):
        assert part in text


def test_the_best_outputs_come_first_and_the_dearest_step_is_1() -> None:
    row = Advice("a", "b", 5.0, 0.5, 0.2, 0.01, "1 of 2", "output", 9.0, 0.3, 100, 10, "full", [], 7, 300)
    worse = replace(row, mutual_knn=4.0, best_mutual_knn=20.0, step_flops=400)
    closer, cheaper = replace(row, cka=0.3), replace(row, step_flops=100)
    costless = replace(row, mutual_knn=1.0, trainable=None, step_flops=None, refused="does not fit")
    found = ranked([costless, worse, row, cheaper, closer])
    assert [r.step_cost for r in found] == [0.75, 0.25, 0.75, 1, None]
    assert [replace(r, step_cost=None) for r in found] == [closer, cheaper, row, worse, costless]
    assert ranked([]) == [] and ranked([costless]) == [costless]


def test_the_demo_is_the_default(capsys: Any) -> None:
    found, _ = listed(capsys, ["--pairs=60", "--workers=0", "--layers=last"])
    assert [(row["vision"], row["text"], row["pairs"], row["k"]) for row in found] == [("demo", "demo", 60, 10)]
    assert len(found[0]["layers"]) == 1


def test_an_image_is_opened_once_for_towers_that_want_it_alike(
    own: str, data: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read = data_images.read_image

    def counted(source: str, transform: Any) -> Any:
        opened.append(source)
        return read(source, transform)

    monkeypatch.setattr(reading, "read_image", counted)
    same = [f"--vision={own}:{name}" for name in ("fresh", "tired")]
    found, said = listed(capsys, [*data, *same, f"--text={own}:ear", "--batch_size=1"])
    assert len(found) == 2 and len(opened) == len(set(opened)) == 12 and not said
    opened.clear()
    listed(capsys, [*data, f"--vision={own}:fresh", f"--vision={own}:other", f"--text={own}:ear"])
    assert len(opened) == 24


@pytest.mark.parametrize(
    ("temper", "message"),
    [
        ("tired", "py:tempers:tired failed: RuntimeError: not so many at once"),
        ("lost", "py:tempers:lost failed: the features of output are not finite for 12 of 12 things"),
        ("gone", "py:tempers:gone failed: py:tempers:gone: .* expected an importable package.module"),
    ],
)
def test_a_vision_tower_that_fails_is_named_and_stops_no_other(
    own: str, data: list[str], capsys: Any, temper: str, message: str
) -> None:
    alone, _ = listed(capsys, [*data, f"--vision={own}:fresh", f"--text={own}:ear"])
    towers = [f"--vision={own}:{temper}", f"--vision={own}:fresh", f"--text={own}:ear"]
    found, said = listed(capsys, [*data, *towers], status=2)
    assert re.search(message, said)
    timeless = [{key: value for key, value in row.items() if key != "step_ms"} for row in (*found, *alone)]
    assert len(found) == 1 and timeless[0] == timeless[1]
    assert "no vision tower is left to compare; expected at least one" in refused(
        capsys, *data, f"--vision={own}:{temper}", f"--text={own}:ear"
    )


def test_so_is_a_text_tower(own: str, data: list[str], capsys: Any) -> None:
    texts = [f"--text={own}:{name}" for name in ("deaf", "ear")]
    found, said = listed(capsys, [*data, f"--vision={own}:fresh", *texts], status=2)
    assert [row["text"] for row in found] == ["py:tempers:ear"]
    assert "lilt: py:tempers:deaf failed: RuntimeError: cannot hear" in said


def test_what_was_found_before_ctrl_c_is_shown(own: str, data: list[str], capsys: Any) -> None:
    texts = [f"--text={own}:{name}" for name in ("ear", "busy")]
    found, said = listed(capsys, [*data, f"--vision={own}:fresh", *texts], status=130)
    assert [row["text"] for row in found] == ["py:tempers:ear"] and "stopped" in said


def test_images_that_cannot_be_read_are_left_out(pictures: Path, own: str, tmp_path: Path, capsys: Any) -> None:
    manifest = tmp_path / "some.jsonl"
    lines = (pictures / "manifest.jsonl").read_text().splitlines()
    broken = json.dumps({"image": "broken.png", "captions": ["nothing"], "split": "train"})
    manifest.write_text("\n".join([*lines, broken]))
    argv = [f"--data={manifest}", f"--image_root={pictures}", "--workers=0", "--k=3"]
    found, said = listed(capsys, [*argv, f"--vision={own}:fresh", f"--vision={own}:other", f"--text={own}:ear"])
    assert [row["pairs"] for row in found] == [12, 12]
    assert re.search(r"1 images could not be read and are left out \(first: .*broken.png", said)
    argv[1] = f"--image_root={tmp_path}"
    message = refused(capsys, *argv, f"--vision={own}:fresh", f"--text={own}:ear")
    assert re.search(r"0 of 13 images could be read \(first fault: .*: 0 pairs are too few for k=3", message)


def test_a_policy_that_does_not_fit_costs_the_prediction_alone(
    own: str, tiny_text: str, tiny_vision: str, data: list[str], capsys: Any
) -> None:
    towers = [f"--vision={own}:fresh", f"--vision={tiny_vision}", f"--text={tiny_text}"]
    found, _ = listed(capsys, [*data, *towers, "--policy=lora"])
    one = next(row for row in found if row["vision"] == "py:tempers:fresh")
    assert one["trainable"] is one["step_flops"] is one["step_ms"] is one["step_cost"] is None
    assert one["mutual_knn"] > 0 and "no weights for targets=qkv" in one["refused"]
    assert main(["advise", *data, *towers, "--policy=lora"]) == 0
    assert "no weights for targets=qkv" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs=13"], r"pairs=13: .* has 12 images; expected 13 pairs .* found 12; give --pairs 12"),
        (["--pairs=4"], "--pairs: 4 pairs are too few for k=3 neighbours; expected at least 5 images"),
        (["--k=11"], "12 pairs are too few for k=11 neighbours; expected at least 13"),
        (["--k=0"], "k=0; expected more than 0"),
        (["--pairs=-1"], "pairs=-1; expected 0 or more"),
        (["--layers=first"], "layers='first'; expected all, or last"),
        (["--policy=layernrom"], "unknown policy 'layernrom'; .* Did you mean 'layernorm'"),
        (["--split=tain"], "has no split 'tain'; .* Did you mean 'train'"),
        (["--pair=3"], "unknown option 'pair'; .* Did you mean 'pairs'"),
        (["--data=nowhere.jsonl"], "manifest 'nowhere.jsonl' does not exist"),
        (["--vision=tim:x"], "no vision tower is left to compare; expected at least one that can be built"),
    ],
)
def test_errors_say_what_to_do(data: list[str], argv: list[str], message: str, capsys: Any) -> None:
    assert re.search(message, refused(capsys, *data, *argv))


def test_pictures_without_captions_are_an_error(tmp_path: Path, capsys: Any) -> None:
    for line, message in (('{"image": "a.png"}', "no captions"), ('{"image": "a.png", "captions": []}', "is empty")):
        (tmp_path / "bare.jsonl").write_text(line)
        assert re.search(rf"bare.jsonl line 1: .*{message}", refused(capsys, f"--data={tmp_path / 'bare.jsonl'}"))
