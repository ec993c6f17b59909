"""Tasks on texts, in columns and of fine-tuning on two processes, with an image missing, are tasks on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilt import DualEncoder
from tests.evaluate import joint_texts
from tests.evaluate.conftest import manifest
from tests.evaluate.test_text_probe import folder, sentences
from tests.test_distributed import ROOT, torchrun


def test_two_ranks_find_what_one_finds(tuned: DualEncoder, pictures: Path, tmp_path: Path) -> None:
    run = tuned.save(tmp_path / "run")
    folder(tmp_path / "sst", train=sentences(41, 1), dev=sentences(23, 2))  # odd, so that shares are not even
    (tmp_path / "sts").mkdir()
    for seed, split in enumerate(("dev", "train"), 3):
        texts = [text for text, _ in sentences(30, seed)]
        both = zip(texts[:15], texts[15:], strict=True)
        lines = (f"{a}\t{b}\t{len(set(a.split()) & set(b.split()))}" for a, b in both)
        (tmp_path / "sts" / f"{split}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    records = [json.loads(line) for line in (pictures / "manifest.jsonl").read_text().splitlines()]
    for number, record in enumerate(records):
        record["second"] = [] if number == 3 else ["the boat", f"paper {record['image'][:-5]}"]
    records.append({"image": "red9.png", "captions": ["a red picture"], "second": "the", "split": "test"})
    data = manifest(tmp_path / "x.jsonl", records)
    joint_texts.main(str(run), data, str(pictures), str(tmp_path))
    torchrun(2, ROOT / "tests" / "evaluate" / "joint_texts.py", run, data, pictures, tmp_path)
    alone, *ranks = (json.loads((tmp_path / f"texts.{name}.json").read_text()) for name in ("1.0", "2.0", "2.1"))
    bars = alone.pop("bars")
    assert all(total == moved for _, total, moved in bars)
    assert {"text_probe: texts", "text_probe: fits", "finetune", "finetune: test", "score_finetune"} <= {
        name for name, _, _ in bars
    }
    for (name, total, _), *shares in zip(bars, *(found.pop("bars") for found in ranks), strict=True):
        # what both do as a whole is counted twice, and so is its total
        whole = 2 * total if name.endswith(("finetune", "fits")) else total
        assert [share[:2] for share in shares] == [[name, whole]] * 2
        assert sum(moved for *_, moved in shares) == whole, name
    wanted = joint_texts.specs(str(tmp_path))
    assert list(alone) == wanted
    for spec, expected in alone.items():
        assert expected["error"] is None, expected
        for found in ranks:
            assert found[spec]["values"] == pytest.approx(expected["values"], abs=1e-4), spec
    columns, vision = alone[wanted[2]]["values"], alone[wanted[4]]["values"]
    assert (columns["num_images"], columns["num_unreadable"], columns["num_second/uncaptioned"]) == (6, 1, 1)
    assert (vision["num_test"], vision["num_unreadable"]) == (6, 1)
    assert alone[wanted[0]]["values"]["num_test"] == 23
