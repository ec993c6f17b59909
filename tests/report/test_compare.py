"""Runs side by side: the numbers of their folders, what does not compare, and the plot."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import lilt
from lilt.cli import main
from lilt.report import Row, compare_runs
from lilt.report.chart import PLAIN
from lilt.report.compare_show import SIZE, draw, labels
from lilt.train import read_metrics
from tests.report.conftest import Train
from tests.report.test_page import check_closed, contract
from tests.report.test_runs import edited, refused
from tests.towers.joint_models import SAVE


def rows(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["compare", *map(str, argv), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found: list[dict[str, Any]] = json.loads(printed)
    return found


def test_the_numbers_are_those_of_the_folders(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, run, other)
    assert [row["run"] for row in found] == [str(other), str(run)]  # fewest trained values first
    assert [row["policy"] for row in found] == ["frozen", "lora(r=2)+layernorm"]
    for row in found:
        folder = Path(row["run"])
        said, lines = contract(folder), read_metrics(folder)
        assert (row["trained"], row["total"]) == (said["trained"], said["total"])
        assert row["percent"] == pytest.approx(100 * said["trained"] / said["total"])
        assert row["mean_recall_before"] == lines[0]["result"]["mean_recall"]
        assert row["mean_recall"] == said["metrics"]["test/mean_recall"]
        for way, key in (("text_to_image", "text_to_image_r1"), ("image_to_text", "image_to_text_r1")):
            assert row[key] == said["metrics"][f"test/{way}/R@1"]
        assert (row["seconds"], row["peak_bytes"]) == (lines[-1]["seconds"], lines[-1]["peak_bytes"])
        assert row["adapter_bytes"] == (folder / "adapter.safetensors").stat().st_size
        assert (row["num_images"], row["finished"], row["differs"]) == (6, True, [])


def test_the_validation_split_can_be_compared(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in rows(capsys, run, other, "--split=val"):
        metrics = contract(Path(row["run"]))["metrics"]
        assert row["mean_recall"] == metrics["val/mean_recall"] and row["mean_recall_before"] is None
        assert row["text_to_image_r1"] == metrics["val/text_to_image/R@1"]


@pytest.mark.parametrize("columns", [400, 80])
def test_the_table_shows_them(
    columns: int, run: Path, other: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = rows(capsys, run, other)
    assert main(["compare", str(run), str(other)]) == 0
    text = capsys.readouterr().out
    joined = re.sub(r"\s", "", text)
    for row in found:
        values = (row["mean_recall_before"], row["mean_recall"], row["text_to_image_r1"], row["image_to_text_r1"])
        for cell in (
            f"{row['trained']:,}",
            f"{row['percent']:.3g}",
            f"{row['seconds']:.1f} s",
            *(f"{v:.2f}" for v in values),
        ):
            assert cell in text
        if columns == 400:
            assert row["run"] in text and row["policy"] in text
    assert "recallsinpercentonthetestsplit,aseachrunnotedthem" in joined
    assert "differs" not in text and all(len(line) <= columns for line in text.splitlines())


def test_runs_that_differ_are_marked(run: Path, train: Train, tiny_text: str, pictures: Path, capsys: Any) -> None:
    text = train("pooled", text=f"{tiny_text}?pool=mean", max_steps=1)
    data = train("elsewhere", data=pictures / "manifest.jsonl", max_steps=1)
    split = train("asked", test_split="val", val_split="none", max_steps=1)
    less = train("less", max_images=6, max_steps=1)
    found = {Path(row["run"]).name: row["differs"] for row in rows(capsys, run, text, data, split, less)}
    assert found == {
        "one": [], "pooled": ["text tower"], "elsewhere": ["training data", "test split", "counted images"],
        "asked": ["test split"], "less": ["training data"],
    }  # fmt: skip
    assert main(["compare", str(run), str(text)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "pooled differs from the first run in: text tower; its numbers do not compare" in re.sub(
        r"(?<=\w)- ", "-", said
    )
    # held against whichever comes first
    assert {Path(row["run"]).name: row["differs"] for row in rows(capsys, text, run)} == {
        "one": ["text tower"], "pooled": [],
    }  # fmt: skip


def test_the_same_weights_at_another_place_are_the_same_tower(run: Path, copied: Path) -> None:
    towers = contract(copied)["towers"]
    edited(copied, towers=towers | {"vision": towers["vision"] | {"spec": "timm:/elsewhere/vision"}})
    assert {row.run: row.differs for row in compare_runs([str(run), str(copied)])}[str(copied)] == ()
    edited(copied, towers=towers | {"vision": towers["vision"] | {"fingerprint": "0" * 64}})
    assert {row.run: row.differs for row in compare_runs([str(run), str(copied)])}[str(copied)] == ("vision tower",)


def test_a_run_that_was_stopped_has_no_numbers_yet(run: Path, copied: Path, capsys: Any) -> None:
    lines = (copied / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (copied / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    metrics = contract(copied)["metrics"]
    edited(copied, metrics={key: value for key, value in metrics.items() if not key.startswith("test/")})
    row = next(row for row in rows(capsys, run, copied) if row["run"] == str(copied))
    assert (row["mean_recall"], row["seconds"], row["finished"], row["differs"]) == (None, None, False, [])
    assert row["mean_recall_before"] is not None
    assert main(["compare", str(run), str(copied)]) == 0
    assert "has not come to its end" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no path is broken."""
    monkeypatch.setenv("COLUMNS", "2000")


@pytest.mark.usefixtures("wide")
def test_a_merged_run_is_at_its_end_and_says_how_it_is_measured(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    half = tmp_path / "half way"
    assert main(["merge", str(run), "--scale=0.5", f"--output={half}"]) == 0
    said = compared(capsys, run, half)
    command = f"lilt evaluate '{half}' --split test --json > 'half way.json'"
    assert "has not come to its end" not in said
    assert f"{half} has not been measured: {command}, then compare 'half way.json'" in said
    row = next(row for row in rows(capsys, run, half) if row["run"] == str(half))
    assert (row["finished"], row["mean_recall"], row["measure"], row["differs"]) == (True, None, command, [])
    # what it says works
    assert main([*shlex.split(command.partition(" --json")[0])[1:], "--workers=0", "--json"]) == 0
    (tmp_path / "half way.json").write_text(capsys.readouterr().out, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    row = next(row for row in rows(capsys, run, "half way.json") if row["run"] == str(half))
    assert row["mean_recall"] > 0 and row["differs"] == []
    # the split is named as the run names it, and what it does not know is left to fill in
    said = compared(capsys, half, "--split=val")
    assert f"lilt evaluate '{half}' --split val --json > 'half way.json'" in said
    (half / "config.yaml").unlink()
    assert f"lilt evaluate '{half}' --data MANIFEST --split test --json > 'half way.json'" in compared(capsys, half)


def compared(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What `lilt compare` prints for people, in one line."""
    capsys.readouterr()
    assert main(["compare", *map(str, argv)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("wide")
def test_what_is_not_known_of_a_run_does_not_differ(run: Path, copied: Path, tmp_path: Path, capsys: Any) -> None:
    saved = tmp_path / "saved"  # from Python: it has neither settings nor lines
    lilt.load(run).save(saved)
    (row,) = (row for row in rows(capsys, run, saved) if row["run"] == str(saved))
    assert (row["differs"], row["finished"], row["mean_recall"]) == ([], True, None)
    assert "has not come to its end" not in compared(capsys, run, saved)
    (copied / "config.yaml").unlink()
    assert {row["run"]: row["differs"] for row in rows(capsys, run, copied)} == {str(run): [], str(copied): []}


def test_data_called_by_another_name_is_the_same_data(run: Path, copied: Path, capsys: Any) -> None:
    file = copied / "config.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    data = Path(settings["data"])
    other = data.parent / ".." / data.parent.name / data.name
    file.write_text(yaml.safe_dump(settings | {"data": str(other)}), encoding="utf-8")
    assert {row["run"]: row["differs"] for row in rows(capsys, run, copied)} == {str(run): [], str(copied): []}


@pytest.fixture(scope="module")
def clip(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lilt evaluate CLIP --json` prints about the test split of the runs."""
    folder = tmp_path_factory.mktemp("baseline")
    words = ["evaluate", SAVE["hf"]("clip", folder), f"--data={manifest}", "--workers=0", "--json"]
    with redirect_stdout(StringIO()) as printed:
        assert main(words) == 0
    file = folder / "clip.json"
    file.write_text(printed.getvalue(), encoding="utf-8")
    return file


def test_a_model_as_it_is_stands_beside_runs(run: Path, other: Path, clip: Path, tmp_path: Path, capsys: Any) -> None:
    said = json.loads(clip.read_text(encoding="utf-8"))
    page = tmp_path / "all.html"
    first, *_ = found = rows(capsys, run, clip, other, f"--html={page}")
    assert [row["policy"] for row in found] == ["as it is", "frozen", "lora(r=2)+layernorm"]
    assert (first["run"], first["trained"], first["differs"]) == (said["of"]["model"], 0, [])
    assert first["mean_recall"] == said["mean_recall"] and first["total"] > 0
    assert first["text_to_image_r1"] == said["text_to_image"]["R@1"]
    label = check_closed(page.read_text(encoding="utf-8")).one("svg").attributes["aria-label"]
    assert f"{Path(first['run']).name}, as it is {first['mean_recall']:.2f}, frozen" in label
    # what is of other images does not compare
    said["num_images"], said["of"]["split"] = 5, "val"
    less = tmp_path / "less.json"
    less.write_text(json.dumps(said), encoding="utf-8")
    assert {row["policy"]: row["differs"] for row in rows(capsys, run, less)} == {
        "as it is": ["test split", "counted images"], "lora(r=2)+layernorm": [],
    }  # fmt: skip
    # a run that was evaluated is as good as its folder
    assert main(["evaluate", str(run), "--workers=0", "--json"]) == 0
    again = tmp_path / "again.json"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    folder, file = rows(capsys, run, again)
    unknown = {"mean_recall_before": None, "seconds": None, "peak_bytes": None}
    assert file.pop("differs") == folder.pop("differs") == []
    assert file.pop("conserved") == folder.pop("conserved") == []
    assert file == pytest.approx(folder | unknown)


def test_models_as_they_are_can_be_alone(clip: Path, tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "clip.png"
    (row,) = rows(capsys, clip, f"--plot={picture}")
    assert row["policy"] == "as it is" and picture.stat().st_size > 1000


def test_a_file_that_is_no_result_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    for number, text in enumerate(('{"mean_recall": 3}', "[1]", "no json")):
        file = tmp_path / f"{number}.json"
        file.write_text(text, encoding="utf-8")
        said = refused(capsys, "compare", str(run), str(file))
        assert "is not what `lilt evaluate MODEL --data MANIFEST --json` prints" in said


def test_the_plot_is_drawn_and_not_drawn_over(run: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    runs = [str(run), str(other)]
    for name in ("all.png", "all.pdf", "all.svg"):
        assert main(["compare", *runs, f"--plot={tmp_path / name}"]) == 0
    with Image.open(tmp_path / "all.png") as picture:
        assert picture.format == "PNG" and len(set(picture.convert("L").tobytes())) > 20
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")
    svg = (tmp_path / "all.svg").read_text(encoding="utf-8")
    assert all(
        name in svg for name in ("frozen", "lora(r=2)+layernorm", "trained values", "mean recall, test split, %")
    )
    before = (tmp_path / "all.png").read_bytes()
    said = refused(capsys, "compare", *runs, f"--plot={tmp_path / 'all.png'}")
    assert "is already there; nothing was changed: replace it with --overwrite" in said
    assert main(["compare", *runs, "--split=val", f"--plot={tmp_path / 'all.png'}", "--overwrite"]) == 0
    assert (tmp_path / "all.png").read_bytes() != before


def test_the_page_holds_plot_and_table(run: Path, other: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "runs.html"
    found = rows(capsys, run, other, f"--html={file}")
    root = check_closed(file.read_text(encoding="utf-8"))
    head, *lines = root.one("table").rows()
    assert head[:3] == ["run", "policy", "trained"]
    for row, line in zip(found, lines, strict=True):
        assert line[:3] == [row["run"], row["policy"], f"{row['trained']:,}"] and line[5] == f"{row['mean_recall']:.2f}"
    label = root.one("svg").attributes["aria-label"]
    assert f"frozen {found[0]['mean_recall']:.2f}, lora(r=2)+layernorm {found[1]['mean_recall']:.2f}" in label
    said = refused(capsys, "compare", str(run), f"--html={file}")
    assert "is already there; nothing was changed: replace it with --overwrite" in said


ROW = Row("a", "p", 1000, 9000, 11.1, 1.0, 20.0, 5.0, 5.0, 9.0, 9, 9, 6, True, ())


def test_names_do_not_stand_on_one_another() -> None:
    many = [
        replace(ROW, run=f"runs/{n}", policy=f"lora(r={n})", trained=1000 + n, mean_recall=20 + n / 9) for n in range(9)
    ]
    many.append(replace(ROW, run="runs/far", policy="full", trained=10**8))
    many.append(replace(ROW, run="hf:clip", policy="as it is", trained=0, mean_recall=20.3))
    figure = Figure(figsize=SIZE, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, PLAIN, many, "test")
    texts = [text for text in axes.texts if text.get_text()]  # the others are lines to points
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    *named, line = labels(many)
    assert [text.get_text() for text in texts] == [line, *named]
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)


def test_runs_of_one_policy_are_told_apart() -> None:
    several = [
        replace(ROW, run=f"runs/{name}", policy=policy)
        for name, policy in (("x", "lora"), ("y", "lora"), ("z", "full"))
    ]
    assert labels(several) == ["lora (x)", "lora (y)", "full"]
    models = [replace(ROW, run=name, policy="as it is", trained=0) for name in ("hf:openai/clip-b", "open_clip:B@web")]
    models[1] = replace(models[1], differs=("test split",))
    assert labels(models) == ["clip-b, as it is", "open_clip:B@web, as it is *"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "/nowhere"], "/nowhere holds no lilt checkpoint; expected lilt.json and adapter.safetensors; check"),
        (["RUN", "--split=train"], "split=train: runs note recalls of their test and their validation split; expected"),
        (["RUN", "--plot=there.gif"], "plot=there.gif: unknown ending; expected one of .png, .pdf, .svg"),
        (["RUN", "--html=there.txt"], "html=there.txt: unknown ending; expected .html; rename it"),
        (["RUN", "--html=nowhere/there.html"], "there is no folder nowhere; expected one that exists; make it first"),
        (["RUN", "--plott=x"], "unknown option 'plott'; lilt compare --help lists all. Did you mean 'plot'"),
        ([], "runs"),
    ],
)
def test_errors_say_what_to_do(words: list[str], message: str, run: Path, capsys: Any) -> None:
    assert re.search(message, refused(capsys, "compare", *(word.replace("RUN", str(run)) for word in words)))


def test_folders_without_a_checkpoint_are_left_out_and_named(run: Path, tmp_path: Path, capsys: Any) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    assert main(["compare", str(begun), str(run), "--json"]) == 0
    printed = capsys.readouterr()
    assert [row["run"] for row in json.loads(printed.out)] == [str(run)]
    assert printed.err == f"left out, for no checkpoint is in them: {begun}\n"
    assert f"{begun} holds no lilt checkpoint; expected lilt.json" in refused(capsys, "compare", str(begun))


def test_what_cannot_be_drawn_is_refused(copied: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    edited(copied, metrics={})
    file = tmp_path / "all.html"
    said = refused(capsys, "compare", str(copied), f"--html={file}")
    assert "none of 1 runs has a recall on its test split; expected one or more to draw; finish the runs" in said
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused(capsys, "compare", str(copied), f"--html={file}")
    assert "html needs matplotlib, which is not installed; pip install 'lilt[plot]'" in said
    assert not file.exists()
    assert main(["compare", str(copied)]) == 0  # a table needs none


def test_help_lists_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  report +Write RUN/report.html", text, re.M)
    assert re.search(r"^  compare +Put several runs side by side", text, re.M)


def test_an_image_size_makes_another_tower(run: Path, tmp_path: Path) -> None:
    small = Path(shutil.copytree(run, tmp_path / "small"))
    towers = contract(small)["towers"]
    edited(
        small, towers=towers | {"vision": towers["vision"] | {"input": towers["vision"]["input"] | {"image_px": 64}}}
    )
    assert {row.run: row.differs for row in compare_runs([str(run), str(small)])}[str(small)] == ("vision tower",)
