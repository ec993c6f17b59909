"""Retrieval by columns: each language as if it were alone, each image encoded once, and what is missing said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from lilt import DualEncoder
from lilt.cli import main
from lilt.data import Sample
from lilt.evaluate import Setting, evaluate_retrieval, flat, parse_task
from tests.conftest import COLOURS
from tests.evaluate.conftest import manifest

GERMAN = {"red": "boat", "green": "photo", "blue": "paper", "yellow": "picture", "white": "paint", "black": "the"}
BOTH = "columns=caption_en|caption_de"


@pytest.fixture
def records(pictures: Path) -> list[dict[str, Any]]:
    """Two languages: English has one caption as a text, German two in a list; one image has no German."""
    made: list[dict[str, Any]] = []
    splits = ("train", "train", "val", "test")
    for colour in COLOURS:
        for take, split in enumerate(splits):
            name = f"{colour}{take}.{'jpg' if take % 2 else 'png'}"
            german = [f"{GERMAN[colour]} paper", f"all {GERMAN[colour]}"]
            made.append({"image": name, "split": split, "caption_en": f"a {colour} picture", "caption_de": german})
    made[-1]["caption_de"] = []  # black3, in test
    return made


@pytest.fixture
def setting(records: list[dict[str, Any]], pictures: Path, tmp_path: Path) -> Setting:
    return Setting(manifest(tmp_path / "two.jsonl", records), str(pictures), batch_size=4)


def alone(model: DualEncoder, records: list[dict[str, Any]], pictures: Path, column: str) -> dict[str, float]:
    """The recalls of the test images that have captions in one column, by the plain way."""
    samples = []
    for record in records:
        captions = record[column] if isinstance(record[column], list) else [record[column]]
        if record["split"] == "test" and captions:
            samples.append(Sample(pictures / record["image"], tuple(captions), "test"))
    return dict(flat(evaluate_retrieval(model.core, samples)))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_column_has_the_recalls_that_it_has_alone(
    tuned: DualEncoder, records: Any, setting: Setting, pictures: Path, batch_size: int
) -> None:
    found = dict(
        parse_task(f"retrieval({BOTH})")(tuned, Setting(setting.data, setting.image_root, batch_size=batch_size))
    )
    for column, images, captions in (("caption_en", 6, 6), ("caption_de", 5, 10)):
        expected = alone(tuned, records, pictures, column)
        for key, value in expected.items():
            if not key.startswith("num_"):
                assert found[f"{column}/{key}"] == pytest.approx(value), key
        assert (found[f"num_{column}/images"], found[f"num_{column}/captions"]) == (images, captions)
        assert found[f"num_{column}/uncaptioned"] == 6 - images
        assert found[f"num_{column}/cut_captions"] == 0
    assert (found["num_images"], found["num_unreadable"]) == (6, 0)
    assert found["caption_en/mean_recall"] != found["caption_de/mean_recall"]


def test_each_image_is_encoded_once_for_all_columns(tuned: DualEncoder, setting: Setting) -> None:
    seen = 0

    def count(module: Any, args: tuple[torch.Tensor]) -> None:
        nonlocal seen
        seen += len(args[0])

    handle = tuned.core.vision.register_forward_pre_hook(count)
    try:
        dict(parse_task(f"retrieval({BOTH},split=train|test)")(tuned, setting))
    finally:
        handle.remove()
    assert seen == 18


def test_late_interaction_goes_by_columns_too(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task(f"retrieval({BOTH},score=late)")(tuned, setting))
    single = dict(parse_task("retrieval(columns=caption_de,score=late)")(tuned, setting))
    cosine = dict(parse_task("retrieval(columns=caption_de)")(tuned, setting))
    assert {k: v for k, v in found.items() if "caption_de" in k} == {k: v for k, v in single.items() if "_de" in k}
    assert single["num_caption_de/images"] == 5
    assert any(single[key] != cosine[key] for key in cosine)


def test_an_unreadable_image_is_left_out_of_every_column(tuned: DualEncoder, records: Any, setting: Setting) -> None:
    records += [{"image": "gone.png", "split": "test", "caption_en": "a boat", "caption_de": "a photo"}]
    Path(setting.data or "").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = dict(parse_task(f"retrieval({BOTH})")(tuned, setting))
    assert (found["num_images"], found["num_unreadable"]) == (6, 1)
    assert (found["num_caption_en/images"], found["num_caption_de/images"]) == (6, 5)


def test_lists_of_lines_are_read_as_xtd10_has_them(
    tuned: DualEncoder, records: Any, setting: Setting, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "xtd"
    folder.mkdir()
    test = [r for r in records if r["split"] == "test"]
    (folder / "test_image_names.txt").write_text("".join(f"{r['image']}\n" for r in test))
    (folder / "test_1kcaptions_en.txt").write_bytes("\r\n".join(r["caption_en"] for r in test).encode())
    (folder / "test_1kcaptions_de.txt").write_text("\n".join((r["caption_de"] or [" "])[0] for r in test) + "\n")
    spec = f"retrieval(data={folder / 'test_image_names.txt'},image_root={pictures},columns=en|de)"
    found = dict(parse_task(spec)(tuned, Setting()))
    expected = alone(tuned, records, pictures, "caption_en")
    assert found["en/mean_recall"] == pytest.approx(expected["mean_recall"])
    assert (found["num_en/captions"], found["num_de/captions"], found["num_de/uncaptioned"]) == (6, 5, 1)
    with pytest.raises(ValueError, match=r"has no column 'dee'; it has: .*\bde, en.* Did you mean 'de'\?"):
        dict(parse_task(spec.replace("|de", "|dee"))(tuned, Setting()))
    (folder / "val_de.txt").write_text("one\ntwo")
    message = (
        r"two files are the column 'de': test_1kcaptions_de.txt and val_de.txt; expected one; .*columns=test_1kcap"
    )
    with pytest.raises(ValueError, match=message):
        dict(parse_task(spec)(tuned, Setting()))
    whole = dict(parse_task(spec.replace("|de", "|test_1kcaptions_de"))(tuned, Setting()))
    assert whole["test_1kcaptions_de/mean_recall"] == found["de/mean_recall"]
    (folder / "de.txt").write_bytes((folder / "test_1kcaptions_de.txt").read_bytes())
    assert dict(parse_task(spec)(tuned, Setting())) == found  # the whole name goes before an ending
    (folder / "de.txt").unlink()
    (folder / "val_de.txt").unlink()
    (folder / "test_1kcaptions_de.txt").write_text("one\ntwo")
    with pytest.raises(
        ValueError, match=r"captions_de.txt has 2 lines and .*names.txt 6; expected one caption for each"
    ):
        dict(parse_task(spec)(tuned, Setting()))


def test_a_dataset_has_columns_too(
    tuned: DualEncoder, records: Any, setting: Setting, pictures: Path, tmp_path: Path
) -> None:
    columns = {
        "image": [{"bytes": (pictures / r["image"]).read_bytes(), "path": None} for r in records],
        "caption_en": [r["caption_en"] for r in records],
        "caption_de": [r["caption_de"] for r in records],
        "part": [r["split"] for r in records],
    }
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "hub")
    spec = f"hf:{tmp_path / 'hub'}?split=part"
    found = dict(parse_task(f"retrieval(data={spec},{BOTH})")(tuned, Setting()))
    assert found == pytest.approx(dict(parse_task(f"retrieval({BOTH})")(tuned, setting)))
    with pytest.raises(ValueError, match=r"has no column 'caption_fr'; it has: image, caption_en, caption_de, part"):
        dict(parse_task(f"retrieval(data={spec},columns=caption_en|caption_fr)")(tuned, Setting()))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("columns=caption_en|caption_fr", r"has no column 'caption_fr'; it has: caption_en, caption_de. Did you mean"),
        (f"{BOTH},split=tets", r"has no split 'tets'; it has: test, train, val. Did you mean 'test'"),
        (f"{BOTH},expected=7", "found 6, expected 7; complete the data"),
        (f"{BOTH},score=lat", "unknown score 'lat'"),
    ],
)
def test_what_is_not_there_is_named(tuned: DualEncoder, setting: Setting, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"retrieval({spec})")(tuned, setting))


def test_a_column_without_a_caption_in_the_split_is_an_error(
    tuned: DualEncoder, records: Any, setting: Setting
) -> None:
    for record in records:
        record["caption_de"] = record["caption_de"] if record["split"] == "train" else None
    Path(setting.data or "").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(ValueError, match=r"none of 6 images in .* has a caption in the column 'caption_de'; expected"):
        dict(parse_task(f"retrieval({BOTH})")(tuned, setting))


@pytest.mark.parametrize("text", ["en|", "en|en"])
def test_columns_are_named_once_each(text: str) -> None:
    with pytest.raises(ValueError, match=r"columns=.* has (an empty name|'en' twice); expected each column once"):
        parse_task(f"retrieval(columns={text})")


def test_a_split_smaller_than_expected_says_so_of_a_karpathy_file(
    tuned: DualEncoder, pictures: Path, tmp_path: Path
) -> None:
    images = [
        {"filepath": ".", "filename": f"{c}3.jpg", "split": "test", "sentences": [{"raw": f"a {c} picture"}]}
        for c in COLOURS
    ]
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    setting = Setting(str(file), str(pictures))
    assert dict(parse_task("retrieval(expected=6)")(tuned, setting))["num_images"] == 6
    with pytest.raises(
        ValueError, match=r"images in .*dataset_coco.json: found 6, expected 5000; complete the data, or"
    ):
        dict(parse_task("retrieval(expected=5000)")(tuned, setting))


def test_english_pairs_are_trained_and_an_unseen_language_evaluated(
    records: Any, setting: Setting, pictures: Path, tmp_path: Path, tiny_vision: str, tiny_text: str, capsys: Any
) -> None:
    """The way of recipes/multilingual.yaml."""
    english = [{"image": r["image"], "captions": [r["caption_en"]], "split": r["split"]} for r in records]
    data = manifest(tmp_path / "english.jsonl", english)
    recipe = Path(__file__).parents[2] / "recipes" / "multilingual.yaml"
    words = ["--vision", tiny_vision, "--text", tiny_text, "--data", data, "--image_root", str(pictures)]
    small = ["--max_steps=2", "--batch_size=4", "--image_px=32", "--workers=0", "--precision=no"]
    run = str(tmp_path / "run")
    assert main(["train", "--config", str(recipe), *words, *small, "--output", run]) == 0
    capsys.readouterr()
    spec = f"retrieval(data={setting.data},image_root={pictures},{BOTH})"
    assert main(["evaluate", run, "--workers=0", "--json", "--task", spec]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"][spec]
    assert found["num_caption_de/images"] == 5
    assert {"caption_en/mean_recall", "caption_de/text_to_image/R@1"} <= found.keys()
    assert main(["evaluate", run, "--workers=0", "--task", spec]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "caption de/image to text/R@10" in table and "caption de/uncaptioned │ 1" in table
