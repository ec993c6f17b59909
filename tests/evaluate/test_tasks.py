"""Tasks on the command line: what they print, what is kept when one fails, and two processes as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lilt import DualEncoder
from lilt.cli import main
from lilt.data import read_manifest, select
from lilt.evaluate import Setting, evaluate, evaluate_retrieval, flat, parse_task, tasks
from lilt.evaluate.task import Task
from tests.evaluate.conftest import BY_NAME

KNN, PROBE = f"knn(k=3,{BY_NAME})", f"probe({BY_NAME})"


@pytest.fixture(scope="module")
def run(tuned: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tuned.save(tmp_path_factory.mktemp("run") / "x"))


@pytest.fixture
def words(run: str, pictures: Path) -> list[str]:
    return ["evaluate", run, f"--data={pictures / 'manifest.jsonl'}", "--workers=0", "--batch_size=5"]


def test_every_task_says_what_it_does_and_starts_from_its_name() -> None:
    assert {"retrieval", "zeroshot", "probe", "knn", "winoground", "classifier", "drift", "moved"} <= set(tasks.names())
    for name in tasks.names():
        task = parse_task(name)
        assert isinstance(task, Task)
        assert task.name == name
        assert tasks[name].__doc__


def test_json_has_the_values_of_each_task(words: list[str], tuned: DualEncoder, setting: Setting, capsys: Any) -> None:
    assert main([*words, "--json", "--task", KNN, f"--task={PROBE}", "--task=retrieval"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found.keys() == {"run", "tasks", "failed"}
    assert found["failed"] == {}
    assert list(found["tasks"]) == [KNN, PROBE, "retrieval"]
    for spec in (KNN, PROBE):
        assert found["tasks"][spec] == pytest.approx(dict(parse_task(spec)(tuned, setting)))
    samples = select(read_manifest(setting.data or ""), "test")
    assert found["tasks"]["retrieval"] == pytest.approx(dict(flat(evaluate_retrieval(tuned.core, samples))))


def test_one_that_fails_is_named_and_the_others_are_kept(words: list[str], capsys: Any) -> None:
    bad = f"knn(k=13,{BY_NAME})"
    assert main([*words, "--json", "--task", KNN, "--task", bad, "--task", "moved"]) == 2
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["tasks"][KNN]["num_test"] == 6
    assert found["tasks"][bad] == {}
    assert "text/embedding" in found["tasks"]["moved"]
    assert found["failed"].keys() == {bad}
    assert f"lilt: {bad} failed: knn: the split 'train' of" in said.err
    assert "Traceback" not in said.err
    assert main([*words, "--task", KNN, "--task", bad]) == 2
    said = capsys.readouterr()
    assert "mean_per_class" in said.out or "mean per class" in said.out
    assert "expected at least k=13" in said.err


@pytest.mark.parametrize(("end", "status"), [(KeyboardInterrupt(), 130), (TypeError("a bug"), None)])
def test_what_was_finished_is_printed_when_a_later_task_is_cut_off(
    words: list[str], end: BaseException, status: int | None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(self: Any, subject: Any) -> Any:
        raise end

    monkeypatch.setattr(type(parse_task("moved")), "measure", cut_off)
    asked = [*words, "--task", KNN, f"--task=knn(k=13,{BY_NAME})", "--task=moved"]

    def ran(*more: str) -> str:
        capsys.readouterr()
        if status is None:
            with pytest.raises(TypeError, match="a bug"):
                main([*asked, *more])
        else:
            assert main([*asked, *more]) == status
        said = capsys.readouterr()
        assert "expected at least k=13" in said.err
        return str(said.out)

    found = json.loads(ran("--json"))
    assert found["tasks"][KNN]["num_test"] == 6
    assert found["tasks"].keys() == {KNN, f"knn(k=13,{BY_NAME})"} and len(found["failed"]) == 1
    assert "mean per class" in ran()
    assert main([*words, "--json", "--task=moved"]) == 130 if status else True
    assert capsys.readouterr().out == ""


def test_what_was_found_before_an_error_stands(tuned: DualEncoder, setting: Setting, pictures: Path) -> None:
    wanted = {spec: parse_task(spec) for spec in ("retrieval(expected=6)", "retrieval(expected=7)", "moved")}
    done = {finished.spec: finished for finished in evaluate(tuned, wanted, setting)}
    assert done["retrieval(expected=6)"].error is None
    assert "found 6, expected 7" in (done["retrieval(expected=7)"].error or "")
    assert done["moved"].values


def test_before_and_after_stand_side_by_side(words: list[str], capsys: Any) -> None:
    assert main([*words, "--task", f"conserve({KNN})", "--task=drift(samples=4)"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    for part in ("before", "after", "kept", "knn/top1", "vision/block 0", "text/pooled"):
        assert part in table


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--task=kn"], "unknown task 'kn'; known: .*"),
        (["--task=knn(k=3"], "cannot read 'knn"),
        (["--task=knn(j=3)"], "knn has no option 'j'; it takes: data,"),
    ],
)
def test_a_wrong_task_is_one_error_before_anything_is_loaded(extra: list[str], message: str, capsys: Any) -> None:
    assert main(["evaluate", "/nowhere", *extra]) == 2
    said = " ".join(capsys.readouterr().err.split())
    import re

    assert re.search(message, said)
