"""Before and after, and the way between."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lilt import DualEncoder, ImageContract
from lilt.evaluate import Setting, parse_task
from lilt.towers import build_tower
from tests.conftest import word_tokenizer
from tests.evaluate.conftest import BY_NAME, manifest
from tests.test_merge import shaken

KNN = f"knn(k=3,{BY_NAME})"


def test_before_is_the_base_and_after_the_tuned_model(
    tuned: DualEncoder, pictures: Path, tmp_path: Path, tiny_vision: str, tiny_text: str
) -> None:
    """Classes that no picture shows are guessed in another way by each model."""
    files = sorted(f for f in pictures.iterdir() if f.suffix in (".png", ".jpg"))
    splits = {"0": "train", "1": "train", "2": "val", "3": "test"}
    records = [
        {"image": str(f), "label": f"c{i * 5 % 7 % 3}", "split": splits[f.stem[-1]]} for i, f in enumerate(files)
    ]
    setting = Setting(manifest(tmp_path / "x.jsonl", records), batch_size=5)
    specs = {"knn": "knn(k=1,test=val|test)", "probe": "probe(val=val)"}
    found = dict(parse_task(f"conserve({'+'.join(specs.values())})")(tuned, setting))
    base = DualEncoder.build(tiny_vision, tiny_text, "frozen", projection="linear(dim=16)")
    differ = False
    for name, spec in specs.items():
        before, after = (dict(parse_task(spec)(model, setting)) for model in (base, tuned))
        differ = differ or before["top1"] != after["top1"]
        for key in ("top1", "mean_per_class"):
            assert found[f"{name}/{key}/before"] == pytest.approx(before[key])
            assert found[f"{name}/{key}/after"] == pytest.approx(after[key])
            if before[key] > 0:
                assert found[f"{name}/{key}/kept"] == pytest.approx(100 * after[key] / before[key])
        assert found[f"num_{name}/test"] == (12 if name == "knn" else 6)
    assert differ
    assert {"probe/penalty/before", "probe/penalty/after"} <= found.keys()
    assert "probe/penalty/kept" not in found
    assert not tuned._off


def test_the_same_task_twice_goes_by_its_spec(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task(f"conserve({KNN}+knn(k=1,{BY_NAME}))")(tuned, setting))
    assert {f"{KNN}/top1/before", f"knn(k=1,{BY_NAME})/top1/before"} <= found.keys()


def test_towers_passed_as_modules_bring_their_base(setting: Setting, tiny_vision: str, tiny_text: str) -> None:
    modules = {side: build_tower(spec, side).body for side, spec in (("vision", tiny_vision), ("text", tiny_text))}
    contracts: dict[str, Any] = {"preprocess": ImageContract(32), "tokenizer": word_tokenizer()}
    base: dict[str, Any] = {**copy.deepcopy(modules), **contracts}
    model = shaken(**modules, **contracts, policy="full", projection="linear(dim=16)")
    with pytest.raises(ValueError, match=r"was passed as a module .*the base is needed"):
        dict(parse_task(f"conserve({KNN})")(model, setting))
    given = Setting(setting.data, setting.image_root, batch_size=5, base=base)
    for spec in (f"conserve({KNN})", "drift(samples=4)", "moved", f"curve({KNN},scales=0|1)"):
        assert dict(parse_task(spec)(model, given))


def test_what_was_finished_before_an_error_is_compared(tuned: DualEncoder, setting: Setting) -> None:
    found = {}
    with pytest.raises(ValueError, match="has no split 'tain'"):
        for name, value in parse_task(f"conserve({KNN}+probe({BY_NAME},train=tain))")(tuned, setting):
            found[name] = value
    assert {"knn/top1/before", "knn/top1/after"} <= found.keys()
    assert not any(name.startswith("probe") for name in found)


def test_the_curve_goes_from_the_base_to_the_tuned_model(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task(f"curve({KNN}+retrieval,scales=0|0.5|1)")(tuned, setting))
    conserved = dict(parse_task(f"conserve({KNN})")(tuned, setting))
    for key in ("top1", "mean_per_class"):
        assert found[f"0/knn/{key}"] == pytest.approx(conserved[f"knn/{key}/before"])
        assert found[f"1/knn/{key}"] == pytest.approx(conserved[f"knn/{key}/after"])
    half = dict(parse_task("retrieval")(tuned.interpolate(0.5), setting))
    assert found["0.5/retrieval/mean_recall"] == pytest.approx(half["mean_recall"])
    assert found["num_0.5/retrieval/images"] == 6
    assert found["num_1/knn/test"] == 6


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("conserve", r"conserve has no task; expected one or more, joined by \+; write conserve\(knn\+probe\)"),
        ("curve", r"curve has no task; .*write curve\(retrieval\)"),
    ],
)
def test_no_task_is_an_error(tuned: DualEncoder, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(spec)(tuned))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("curve(retrieval,scales=0|2)", r"scales=0\|2: 2 is outside 0 to 1; write"),
        ("curve(retrieval,scales=half)", "scales=half: expected numbers from 0 to 1; write"),
        ("conserve(knnn)", "unknown task 'knnn'; known: .*knn.*Did you mean 'knn'"),
        ("knn(kk=3)", "knn has no option 'kk'; it takes: "),
        ("knn(k=many)", "knn: k=many is not of type int"),
        ("probe(label_from=x)", "label_from=x has 0 groups"),
    ],
)
def test_a_spec_that_cannot_be_read_is_an_error(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_task(spec)
