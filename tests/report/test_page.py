"""The page of a real run: whole, closed to the outside, and true to what the run wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lilt
from lilt.cli import main
from lilt.report.page import PARTS
from lilt.train import read_metrics
from tests.report.conftest import CONSERVE, HOSTILE
from tests.report.dom import Node, read

FETCHING = {"src", "srcset", "href", "xlink:href", "poster", "data", "action", "formaction", "background", "cite"}
WAYS = {"text_to_image": "text → image", "image_to_text": "image → text"}


def check_closed(text: str) -> Node:
    """A page that asks for nothing outside itself and runs nothing."""
    root = read(text)
    ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in root.walk():
        assert node.tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for key, value in node.attributes.items():
            assert not key.startswith("on")
            if key in FETCHING:
                assert value.startswith("data:image/jpeg;base64,") or value.removeprefix("#") in ids, (node.tag, value)
            assert all(target in ids for target in re.findall(r"url\(#?([^)]*)\)", value)), value
    (policy,) = (node for node in root.all("meta") if node.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none';")
    assert not re.search(r"@import|url\(|expression", root.one("style").text)
    return root


def contract(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "lilt.json").read_text(encoding="utf-8")))


def tables(node: Node) -> dict[str, list[list[str]]]:
    """The tables below by their captions."""
    return {table.one("caption").text: table.rows() for table in node.all("table")}


def test_it_is_one_file_that_asks_for_nothing(written: Path) -> None:
    check_closed(written.read_text(encoding="utf-8"))
    assert not list(written.parent.glob("*.tmp"))


def test_every_part_is_there_and_linked(page: Node) -> None:
    assert [section.attributes["id"] for section in page.all("section")] == list(PARTS)
    assert [link.attributes["href"] for link in page.one("nav").all("a")] == [f"#{name}" for name in PARTS]
    assert page.one("html").attributes["lang"] == "en" and page.one("title").text
    assert [node.text for node in page.all("h1")] == ["one"]
    assert len(page.all("h2")) == len(PARTS)


def test_who_cannot_see_is_told(page: Node) -> None:
    images, drawings = page.all("img"), page.all("svg")
    assert images and all(image.attributes["alt"].strip() for image in images)
    assert drawings and all(d.attributes["role"] == "img" and d.attributes["aria-label"] for d in drawings)
    for table in page.all("table"):
        assert table.one("caption").text and all(head.attributes.get("scope") for head in table.all("th"))


def test_curves_are_drawn_of_what_the_run_noted(page: Node, run: Path) -> None:
    lines = read_metrics(run)
    losses = [line for line in lines if "loss" in line]
    looks = [line for line in lines if line.get("split") == "val"]
    assert len(losses) == 4 and len(looks) == 2
    drawings = page.one(id="curves").all("svg")
    said = [drawing.attributes["aria-label"] for drawing in drawings]
    assert said[0].startswith(f"loss from {losses[0]['loss']:.3g} at step 1 to ")
    peaks = {max(course) for course in zip(*(line["lr"] for line in losses), strict=True)}
    assert len(peaks) > 1 and said[1].count("learning rate from") == len(peaks)  # those that agree are one line
    assert said[2] == f"scale from {losses[0]['scale']:.3g} at step 1 to {losses[-1]['scale']:.3g} at step 4"
    recall = [look["mean_recall"] for look in looks]
    assert said[3] == f"mean recall from {recall[0]:.3g} at step 2 to {recall[1]:.3g} at step 4"
    # they are drawn in the page's own colours and letters
    for drawing in drawings:
        colours = {c for node in drawing.walk() for c in re.findall(r"#[0-9a-f]{6}", node.attributes.get("style", ""))}
        assert not colours and drawing.all("text")


def test_recalls_are_those_of_the_checkpoint(page: Node, run: Path) -> None:
    metrics = contract(run)["metrics"]
    before = read_metrics(run)[0]["result"]
    found = tables(page.one(id="recalls"))
    assert list(found) == ["test split, %", "validation split, %"]
    head, *rows = found["test split, %"]
    assert head == ["", "before", "after", "change"]
    shown = {row[0]: row[1:] for row in rows}
    assert shown["mean recall"][:2] == [f"{before['mean_recall']:.2f}", f"{metrics['test/mean_recall']:.2f}"]
    for side, name in WAYS.items():
        for rank, title in (
            ("R@1", "R@1"),
            ("R@5", "R@5"),
            ("R@10", "R@10"),
            ("median_rank", "median rank (1 is best)"),
        ):
            values = before[side][rank], metrics[f"test/{side}/{rank}"]
            assert shown[f"{name} {title}"] == [*(f"{v:.2f}" for v in values), f"{values[1] - values[0]:+.2f}"]
    chosen = {row[0]: row[1] for row in found["validation split, %"][1:]}
    assert chosen["mean recall"] == f"{metrics['val/mean_recall']:.2f}"
    assert f"It chose the checkpoint: step {metrics['val/step']:.0f}." in page.one(id="recalls").text
    assert "6 images, 24 captions" in page.one(id="recalls").text


def test_trained_values_are_counted_where_they_are(page: Node, run: Path) -> None:
    tensors, part = contract(run)["tensors"], page.one(id="parameters")
    found = tables(part)
    assert list(found) == ["vision", "text", "heads"]
    for side in ("vision", "text"):
        roles, *rows = found[side]
        assert roles == ["", "norm", "attention"]
        numbers = {row[0]: [int(cell.replace(",", "") or 0) for cell in row[1:]] for row in rows}
        own = {name: shape for name, shape in tensors.items() if name.startswith(f"{side}.")}
        for number in (0, 1):
            block = rf"\.(blocks|layer)\.{number}\."
            values = [size(s) for name, s in own.items() if re.search(block, name)]
            norms = [size(s) for name, s in own.items() if re.search(f"{block}.*norm", name, re.I)]
            assert numbers[f"block {number}"] == [sum(norms), sum(values) - sum(norms)]
        assert sum(map(sum, numbers.values())) == sum(size(shape) for shape in own.values())
    assert found["heads"][1:] == [["projection", "1,056"], ["scale", "1"]]
    assert f"{contract(run)['trained']:,} of {contract(run)['total']:,} values are trained" in part.text
    assert len(part.all("svg")) == 3


def size(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def test_strangers_captions_are_text(page: Node, written: Path, manifest: Path) -> None:
    assert "<script" not in written.read_text(encoding="utf-8").lower()
    hostile = {
        record["captions"][-1]
        for record in map(json.loads, manifest.read_text(encoding="utf-8").splitlines())
        if record["split"] == "test"
    }
    assert hostile == {HOSTILE.format(f"{c}3.jpg", c) for c in ("red", "green", "blue", "yellow", "white", "black")}
    shown = {node.text for node in page.one(id="gallery").walk() if node.tag in ("q", "blockquote")}
    assert hostile & shown


def test_right_and_wrong_are_as_the_model_says(page: Node, run: Path, manifest: Path) -> None:
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    tests = [record for record in records if record["split"] == "test"]
    captions = [caption for record in tests for caption in record["captions"]]
    owner = [number for number, record in enumerate(tests) for _ in record["captions"]]
    rows = lilt.load(run).embed([manifest.parent / record["image"] for record in tests], captions)
    image, text = rows["image"].double().tolist(), rows["text"].double().tolist()
    scores = [[sum(a * b for a, b in zip(i, t, strict=True)) for i in image] for t in text]
    articles = page.one(id="gallery").all("article")
    assert [a.attributes["data-kind"] for a in articles] == ["caption"] * 6 + ["image"] * 6
    for article in articles:
        query, kind = int(article.attributes["data-query"]), article.attributes["data-kind"]
        if kind == "caption":
            assert article.one("blockquote").text == captions[query]
            found, own = scores[query], [n == owner[query] for n in range(len(tests))]
        else:
            found, own = [line[query] for line in scores], [n == query for n in owner]
        best = max(s for s, mine in zip(found, own, strict=True) if mine)
        rank = 1 + sum(s >= best - 1e-7 for s, mine in zip(found, own, strict=True) if not mine)
        assert int(article.attributes["data-rank"]) == rank
        assert article.one(class_="verdict").text == ("✓ right" if rank == 1 else f"✗ wrong: rank {rank}")
        assert ("right" if rank == 1 else "wrong") in article.attributes["class"].split()
        hits = article.all(class_="hit")
        places = [int(hit.attributes["data-place"]) for hit in hits]
        assert places == sorted(places) and places[:5] == [1, 2, 3, 4, 5][: len(places)]
        marked = [int(hit.attributes["data-place"]) for hit in hits if "own" in hit.attributes["class"].split()]
        assert min(marked) == rank and all(
            ("✓ its own" in h.text) == ("own" in h.attributes["class"].split()) for h in hits
        )
        cosines = [float(re.findall(r"-?\d\.\d{3}", hit.text)[0]) for hit in hits]
        expected = sorted(found, reverse=True)
        assert cosines == [pytest.approx(expected[place - 1], abs=6e-4) for place in places]


def test_conservation_is_what_evaluate_finds(page: Node, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--task", CONSERVE, "--task=moved", "--workers=0", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)["tasks"]
    found = tables(page.one(id="conservation"))
    (caption,) = (name for name in found if name.startswith("the towers before and after: "))
    rows = {row[0]: row[1:] for row in found[caption][1:]}
    recalls = [f"retrieval/{side}/{rank}" for side in WAYS for rank in ("R@1", "R@5", "R@10", "median_rank")]
    assert list(rows) == ["knn/top1", "knn/top5", "knn/mean_per_class", *recalls, "retrieval/mean_recall"]
    for name, cells in rows.items():
        before, after = (done[CONSERVE][f"{name}/{state}"] for state in ("before", "after"))
        kept = done[CONSERVE].get(f"{name}/kept")
        assert cells[:3] == [f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"]
        verdict = "" if kept is None else "● kept" if abs(kept - 100) < 2 else "▲ gained" if kept > 100 else "▼ lost"
        assert cells[3:] == ["" if kept is None else f"{kept:.1f}", verdict]
    verdicts = [cells[-1] for cells in rows.values()]
    counted = {word: sum(v.endswith(word) for v in verdicts) for word in ("gained", "kept", "lost")}
    assert caption.endswith(", ".join(f"{count} {word}" for word, count in counted.items()))
    assert counted["kept"] < sum(counted.values())
    moved = {
        (row[0], role): cell
        for role_row in [found["moved: vision"]]
        for row in role_row[1:]
        for role, cell in zip(role_row[0][1:], row[1:], strict=True)
    }
    assert moved["block 1", "norm"] == f"{done['moved']['vision/block 1/norm']:.3g}"
    assert moved["block 0", "attention"] == f"{done['moved']['vision/block 0/attention']:.3g}"
    assert "retrieval(split=val)" in found


def test_cost_is_what_the_run_noted(page: Node, run: Path) -> None:
    end, part = read_metrics(run)[-1], page.one(id="cost")
    names = [item.text for item in part.one("ul", class_="legend").all("li")]
    total = sum(end["seconds_by_part"].values())
    assert names == [f"{p} {s:.1f} s ({100 * s / total:.1f} %)" for p, s in end["seconds_by_part"].items()]
    pieces = [
        float(re.findall(r"--share:([\d.]+)", s.attributes["style"])[0]) for s in part.one(class_="split").all("span")
    ]
    assert sum(pieces) == pytest.approx(100, abs=0.01)
    facts = dict(zip([n.text for n in part.all("dt")], [n.text for n in part.all("dd")], strict=True))
    assert facts["wall clock"] == f"{end['seconds']:.1f} s"
    assert facts["pairs per second"] == f"{end['pairs_per_second']:.1f}"
    assert {"dollars (at 2 an hour)", "process-hours (1 x cpu)", "peak memory of a process"} <= facts.keys()


def test_everything_needed_to_do_it_again(page: Node, run: Path) -> None:
    said, part = contract(run), page.one(id="recipe")
    assert part.all("pre")[0].text == f"lilt train --config {run / 'config.yaml'} --output {run}-again"
    for side in ("vision", "text"):
        assert said["towers"][side]["fingerprint"] in part.text and said["towers"][side]["spec"] in part.text
    assert said["adapter_sha256"] in part.text
    facts = dict(zip([n.text for n in part.all("dt")], [n.text for n in part.all("dd")], strict=True))
    assert said["versions"].items() <= facts.items()
    assert facts["seed"] == "0"
    assert (run / "config.yaml").read_text(encoding="utf-8") in part.text


def test_pictures_are_small_jpegs(page: Node) -> None:
    import base64
    import io

    for image in page.one(id="gallery").all("img"):
        head, _, body = image.attributes["src"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(body))) as picture:
            assert head == "data:image/jpeg;base64" and picture.format == "JPEG" and max(picture.size) <= 192
