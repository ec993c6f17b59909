"""Votes of neighbours against a loop over all pairs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilt import DualEncoder, ImageContract
from lilt.data import eval_transform, open_image
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.knn import neighbour_ranks
from lilt.evaluate.parts import Known
from tests.evaluate.conftest import BY_NAME, manifest


def known(rows: int, seed: int, classes: int) -> Known:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    spots = torch.randn(classes, 5, generator=torch.Generator().manual_seed(9))
    scale = torch.rand(rows, 1, generator=generator) * 4 + 0.5  # cosines must not see it
    return Known((spots[labels] + torch.randn(rows, 5, generator=generator)) * scale, labels)


def slow(bank: Known, queries: Known, classes: int, k: int, temperature: float) -> list[int]:
    """The rank of each right class, one dot product at a time."""

    def cosine(a: Tensor, b: Tensor) -> float:
        dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
        return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))

    ranks = []
    for query, label in zip(queries.features, queries.labels.tolist(), strict=True):
        near = sorted(((cosine(query, f), c) for f, c in zip(bank.features, bank.labels.tolist(), strict=True)))[-k:]
        votes = [sum(math.exp(s / temperature) for s, c in near if c == wanted) for wanted in range(classes)]
        ranks.append(1 + sum(v >= votes[label] for c, v in enumerate(votes) if c != label))
    return ranks


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (5, 10.0), (30, 0.5)])
def test_ranks_are_those_of_a_slow_loop(k: int, temperature: float, chunk: int | None) -> None:
    bank, queries = known(30, 1, 7), known(13, 2, 7)
    found = neighbour_ranks(bank, queries, 8, k, temperature, chunk)  # nothing is of the last class
    assert found.tolist() == slow(bank, queries, 8, k, temperature)


def test_a_small_temperature_asks_the_nearest_alone() -> None:
    bank, queries = known(30, 1, 7), known(13, 2, 7)
    assert torch.equal(neighbour_ranks(bank, queries, 7, 30, 0.001) == 1, neighbour_ranks(bank, queries, 7, 1, 1) == 1)


def test_a_class_without_a_neighbour_is_not_found_among_others_without() -> None:
    bank = Known(torch.eye(2), torch.tensor([0, 1]))
    queries = Known(torch.tensor([[1.0, 0.1], [0.2, 1.0]]), torch.tensor([2, 1]))
    assert neighbour_ranks(bank, queries, 4, 1, 0.07).tolist() == [4, 1]


def test_the_task_counts_what_it_did(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task(f"knn(k=3,{BY_NAME})")(tuned, setting))
    assert found.keys() == {
        "top1", "top5", "mean_per_class", "num_test", "num_train", "num_classes", "num_also_in_test", "num_unreadable",
        "num_unlabelled",
    }  # fmt: skip
    assert (found["num_test"], found["num_train"], found["num_classes"], found["num_also_in_test"]) == (6, 12, 6, 0)
    assert found["top1"] == found["mean_per_class"]  # one test picture a class
    # plain colours are told apart without training, by chance one in six is
    assert found["top1"] > 60


def test_it_is_the_towers_features_that_vote(tuned: DualEncoder, setting: Setting, pictures: Path) -> None:
    found = dict(parse_task(f"knn(k=1,{BY_NAME})")(tuned, setting))
    files = [sorted(pictures.glob(pattern)) for pattern in ("*[01].*", "*3.*")]
    colours = sorted({f.stem[:-1] for f in files[0]})
    contract = tuned.core.vision.contract
    assert isinstance(contract, ImageContract)
    with torch.no_grad():
        rows = [tuned.core.vision(torch.stack([eval_transform(contract)(open_image(f)) for f in p])) for p in files]
    bank, queries = (
        Known(r, torch.tensor([colours.index(f.stem[:-1]) for f in part])) for r, part in zip(rows, files, strict=True)
    )
    expected = slow(bank, queries, 6, 1, 0.07)
    assert found["top1"] == pytest.approx(100 * sum(r == 1 for r in expected) / 6)


def test_the_text_tower_is_asked_about_captions(tuned: DualEncoder, setting: Setting, tmp_path: Path) -> None:
    records = [
        {"text": f"{words} {colour}", "label": colour, "split": split}
        for colour in ("red", "green", "blue")
        for words, split in (("a photo of the", "train"), ("a boat on", "train"), ("the paper is", "test"))
    ]
    task = parse_task(f"knn(k=2,side=text,data={manifest(tmp_path / 'x.jsonl', records)})")
    found = dict(task(tuned, setting))
    assert (found["num_test"], found["num_train"], found["num_classes"]) == (3, 6, 3)


def test_what_is_tested_is_not_learned(tuned: DualEncoder, setting: Setting, pictures: Path, tmp_path: Path) -> None:
    records = [
        {"image": str(f), "label": f.stem[:-1], "split": split}
        for split, digits in (("train", "012"), ("test", "23"))
        for f in sorted(pictures.iterdir())
        if f.stem[-1] in digits
    ]
    found = dict(parse_task(f"knn(k=3,data={manifest(tmp_path / 'x.jsonl', records)})")(tuned, setting))
    assert (found["num_also_in_test"], found["num_train"], found["num_test"]) == (6, 12, 12)


@pytest.mark.parametrize("task", ["knn(k=1", "probe(", "finetune(side=vision"])
def test_a_single_class_is_refused(tuned: DualEncoder, setting: Setting, task: str) -> None:
    name, options = task.split("(")
    # of the six colours only red is read from the file names
    message = (
        rf"{name}: the split 'train' of .*manifest.jsonl has one class \('red', of 2 examples\), and 20 lines of the "
        r"data are without a label; expected two classes or more"
    )
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"{name}({options}{',' * bool(options)}label_from=(red)\\d)")(tuned, setting))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("knn(k=0)", r"knn\(k=0,temperature=0.07\); expected both above 0"),
        ("knn(k=3,temperature=0)", "expected both above 0"),
        (f"knn(k=13,{BY_NAME})", r"the split 'train' of .* has 12 images, expected at least k=13; give more, or a"),
        (
            f"knn(k=3,test=train,{BY_NAME})",
            "knn: the split 'train' is used twice .* what is tested must not be learned",
        ),
        (f"knn(k=3,test=val|train,{BY_NAME})", r"the split 'train' is used twice \(train, val\|train\)"),
        (f"knn(side=left,{BY_NAME})", "knn: side=left; expected vision or text"),
        (f"knn(k=3,train=tain,{BY_NAME})", "has no split 'tain'; it has: test, train, val. Did you mean 'train'?"),
        (f"knn(k=3,expected=7,{BY_NAME})", "knn: labelled images to test on: found 6, expected 7; complete the data"),
        (
            "knn(k=3)",
            r"manifest.jsonl line 1: no label; expected a name or a number under label or class, it has image,",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error(tuned: DualEncoder, setting: Setting, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(spec)(tuned, setting))
