"""Texts with a class: every shape of file, features of pairs, and a probe that scikit-learn agrees with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, matthews_corrcoef

import lilt
from lilt import DualEncoder
from lilt.cli import main
from lilt.evaluate import Setting, Subject, parse_task
from lilt.evaluate.classed import Classed
from lilt.evaluate.lines import read_lines
from lilt.evaluate.sentences import kept_back, labels_of, read_sentences
from lilt.evaluate.text_probe import TextProbe
from lilt.towers.tokenizer import FixedTokenizer
from tests.conftest import COLOURS, WORDS
from tests.evaluate.conftest import manifest

KIT = os.environ.get("LILT_KIT", "")


def sentences(rows: int, seed: int) -> list[tuple[str, int]]:
    """Texts of random words; whether red or boat is among them is their class."""
    generator = torch.Generator().manual_seed(seed)
    known = [*COLOURS, *WORDS]
    made = []
    for _ in range(rows):
        words = [known[int(i)] for i in torch.randint(len(known), (5,), generator=generator)]
        made.append((" ".join(words), int("red" in words or "boat" in words)))
    return made


def folder(path: Path, **splits: list[tuple[str, int]]) -> str:
    path.mkdir(exist_ok=True)
    for split, rows in splits.items():
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """40 training and 30 dev texts; one dev text twice, one in train too; a test split without labels."""
    train, dev = sentences(39, 1), sentences(29, 2)
    made = folder(tmp_path / "SST-2", train=[*train, dev[0]], dev=[*dev, dev[1]])
    (tmp_path / "SST-2" / "test.tsv").write_text("index\tsentence\n0\ta boat\n")
    return made


def features(model: DualEncoder, texts: list[str]) -> np.ndarray:
    """Pooled features one text at a time."""
    tokenizer: Any = model.core.text.contract
    with torch.no_grad():
        return np.concatenate([model.core.text(tokenizer.pad(tokenizer.encode([t])[0])).numpy() for t in texts])


def parts(task: Any, setting: Setting, model: DualEncoder) -> Classed:
    assert isinstance(task, TextProbe)
    return task.classed(Subject(model, setting))


def by_sklearn(learn: np.ndarray, labels: Any, queries: np.ndarray, penalty: float) -> np.ndarray:
    mean, spread = learn.mean(0), learn.std(0)
    # of two classes scikit-learn fits one weight, the difference of ours: |w|^2 there is 2 (|w_0|^2 + |w_1|^2) here
    solver = LogisticRegression(C=2 / (penalty * len(learn)), tol=1e-10, max_iter=100_000)
    return np.asarray(solver.fit((learn - mean) / spread, labels).predict((queries - mean) / spread))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_answer_is_that_of_scikit_learn(tuned: DualEncoder, data: str, batch_size: int) -> None:
    task, setting = parse_task(f"text_probe(data={data},test=dev)"), Setting(batch_size=batch_size)
    found = dict(task(tuned, setting))
    classed = parts(task, setting, tuned)
    train, held, test = classed.parts
    texts = [[item[0] for item in part.items] for part in (train, held, test)]
    learn = features(tuned, texts[0] + texts[1])
    named = by_sklearn(
        learn, [*train.labels.tolist(), *held.labels.tolist()], features(tuned, texts[2]), found["penalty"]
    )
    truth = test.labels.numpy()
    assert found["top1"] == pytest.approx(100 * float((named == truth).mean()))
    assert found["f1"] == pytest.approx(100 * f1_score(truth, named))
    assert found["matthews"] == pytest.approx(100 * matthews_corrcoef(truth, named))
    assert found["top1"] > 50
    assert (found["num_test"], found["num_train"] + found["num_validation"]) == (30, 39)  # as often as they are there
    assert (found["num_also_in_test"], found["num_classes"], found["num_malformed"]) == (1, 2, 0)


def test_a_pair_is_both_and_what_is_between(tuned: DualEncoder, tmp_path: Path) -> None:
    """The probe of pairs is the probe of [u, v, |u - v|, u v], built here by hand."""
    texts = [text for text, _ in sentences(60, 3)]
    rows = [
        (texts[i], texts[(7 * i + 1) % 60], int(("red" in texts[i]) == ("red" in texts[(7 * i + 1) % 60])))
        for i in range(60)
    ]
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *(f"{c}\t1\t2\t{a}\t{b}" for a, b, c in rows)]
    (tmp_path / "train.tsv").write_text("\n".join(lines[:41]))
    (tmp_path / "test.tsv").write_text("\n".join([lines[0], *lines[41:]]))
    task, setting = parse_task(f"text_probe(data={tmp_path})"), Setting()
    found = dict(task(tuned, setting))
    train, held, test = parts(task, setting, tuned).parts
    built = []
    for part in (train, held, test):
        u, v = (features(tuned, [item[side] for item in part.items]) for side in (0, 1))
        built.append(np.concatenate([u, v, np.abs(u - v), u * v], axis=1))
    labels = [*train.labels.tolist(), *held.labels.tolist()]
    named = by_sklearn(np.concatenate(built[:2]), labels, built[2], found["penalty"])
    assert built[0].shape[1] == 128
    assert found["top1"] == pytest.approx(100 * float((named == test.labels.numpy()).mean()))
    assert (found["num_test"], found["num_classes"]) == (20, 2)


def pairs(path: Path, **splits: int) -> str:
    """Pairs of texts: whether both have the same colour is their class, half of each."""
    path.mkdir()
    for seed, (split, rows) in enumerate(splits.items()):
        generator = torch.Generator().manual_seed(seed)
        lines = ["sentence1\tsentence2\tlabel"]
        for row in range(rows):
            one, two = (list(COLOURS)[int(i)] for i in torch.randperm(len(COLOURS), generator=generator)[:2])
            drawn = torch.randint(len(WORDS), (4,), generator=generator)
            words = " ".join(WORDS[int(i)] for i in drawn)
            lines.append(f"a {one} boat\tthe {one if row % 2 else two} {words}\t{row % 2}")
        (path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_pair_can_be_one_sequence(tuned: DualEncoder, tmp_path: Path) -> None:
    """The features are those of what the library's tokenizer makes of two texts."""
    data = pairs(tmp_path / "pairs", train=30, val=12, test=20)
    task, setting = parse_task(f"text_probe(data={data},joint=true,max_tokens=10)"), Setting(batch_size=3)
    found = dict(task(tuned, setting))
    contract: Any = tuned.core.text.contract
    built = []
    for part in parts(task, setting, tuned).parts:
        rows = []
        for ((one, two),) in part.items:
            tokens = contract.tokenizer(one, two, truncation=True, max_length=10, return_tensors="pt")
            assert int((tokens["input_ids"] == contract.tokenizer.sep_token_id).sum()) == 2
            with torch.no_grad():
                rows.append(tuned.core.text(dict(tokens)).numpy())
        built.append(np.concatenate(rows))
    train, held, test = parts(task, setting, tuned).parts
    labels = [*train.labels.tolist(), *held.labels.tolist()]
    named = by_sklearn(np.concatenate(built[:2]), labels, built[2], found["penalty"])
    assert found["top1"] == pytest.approx(100 * float((named == test.labels.numpy()).mean()))
    texts = {text for part in (train, held, test) for (text,) in part.items}
    whole = sum(len(contract.tokenizer(*text)["input_ids"]) > 10 for text in texts)
    assert found["num_cut_texts"] == whole > 0


def test_texts_that_cannot_be_joined_are_named(tuned: DualEncoder, data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"joint=true, and .*train.tsv line 2 has a single text; expected two a line"):
        dict(parse_task(f"text_probe(data={data},test=dev,joint=true)")(tuned, Setting()))
    given = pairs(tmp_path / "pairs", train=6, test=6)
    own = tuned.core.text.contract
    tuned.core.text.contract = FixedTokenizer(lambda texts: torch.ones(len(texts), 4, dtype=torch.long), 4)
    try:
        with pytest.raises(ValueError, match=r"was given two texts to join, and takes one; expected a transformers"):
            dict(parse_task(f"text_probe(data={given},joint=true)")(tuned, Setting()))
    finally:
        tuned.core.text.contract = own


HE_SAID = b'\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe said "no\t"No\r\n'
MNLI = b"genre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\nx\t(A)\tA\tB\tn\tn\nx\t(A)\tA\tC\tn\t-\n"
LINES = b'{"premise": "A", "hypothesis": "B", "label": 2}\n{"premise": "A", "hypothesis": "C", "label": -1}\n'
# name of the file, what is in it, the texts and the class of each line that has one
SHAPES: dict[str, tuple[str, bytes, list[tuple[tuple[str, ...], Any]]]] = {
    "sst": (
        "train.tsv",
        b'sentence\tlabel\n"a "quoted \t0\nthe end "\t1\n',
        [(('"a "quoted ',), 0), (('the end "',), 1)],
    ),
    "cola": ("train.tsv", b"gj04\t1\t\tWe sing\ngj04\t0\t*\tWe sings\n", [(("We sing",), 1), (("We sings",), 0)]),
    "mrpc": ("train.tsv", HE_SAID, [(('He said "no', '"No'), 1)]),
    "qqp": (
        "dev.tsv",
        b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t0\n",
        [(("A?", "B?"), 0)],
    ),
    "rte": ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\tA\tB\tnot\n", [(("A", "B"), "not")]),
    "qnli": ("dev.tsv", b"index\tquestion\tsentence\tlabel\n0\tA?\tB\tnot\n", [(("A?", "B"), "not")]),
    "mnli": ("dev_matched.tsv", MNLI, [(("A", "B"), "n")]),
    "table": ("x.csv", b'text,class\n"one, two",3\n', [(("one, two",), 3)]),
    "lines": ("x.jsonl", LINES, [(("A", "B"), 2)]),
    "captions": ("x.jsonl", b'{"captions": ["one", "two"], "label": "c"}\n', [(("one",), "c"), (("two",), "c")]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_file_is_read_as_it_is(shape: str, tmp_path: Path) -> None:
    name, content, expected = SHAPES[shape]
    file = tmp_path / name
    file.write_bytes(content)
    for source, split in ((file, "test"), (tmp_path, file.stem)):  # a file alone, and as one of a folder
        lines = read_lines(source, [split])
        hidden = kept_back(lines, str(source), None)
        read = read_sentences(lines[split], str(source), None, None, labels_of(None, None, hidden))
        assert [
            (one.texts, int(one.said) if str(one.said).isdecimal() else one.said) for one in read.sentences
        ] == expected
        assert (read.silent, read.malformed) == (int(shape in ("mnli", "lines")), 0)


def test_a_dataset_and_a_file_with_splits_are_as_a_folder(tuned: DualEncoder, data: str, tmp_path: Path) -> None:
    rows = {
        split: [line.split("\t") for line in (Path(data) / f"{split}.tsv").read_text().splitlines()[1:]]
        for split in ("train", "dev")
    }
    expected = dict(parse_task(f"text_probe(data={data},test=dev)")(tuned))
    records = [{"phrase": t, "mark": int(y), "split": s} for s, some in rows.items() for t, y in some]
    file = manifest(tmp_path / "x.jsonl", records)
    assert dict(parse_task(f"text_probe(data={file},test=dev,text=phrase,label=mark)")(tuned)) == expected
    splits = {
        s: datasets.Dataset.from_dict({"sentence": [t for t, _ in some], "label": [int(y) for _, y in some]})
        for s, some in rows.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    assert dict(parse_task(f"text_probe(data=hf:{tmp_path / 'hub'},test=dev)")(tuned)) == expected


def test_names_of_images_carry_the_class_of_their_captions(
    tuned: DualEncoder, setting: Setting, pictures: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in (pictures / "manifest.jsonl").read_text().splitlines()]
    for record in records:  # all splits have the same captions
        record["captions"] = [
            f"{'the ' * ('train', 'val', 'test').index(record['split'])}{c}" for c in record["captions"]
        ]
    found = dict(
        parse_task(rf"text_probe(data={manifest(tmp_path / 'x.jsonl', records)},label_from=([a-z]+)\d)")(tuned)
    )
    assert (found["num_test"], found["num_validation"], found["num_classes"]) == (18, 18, 6)
    assert (found["num_unlabelled"], found["num_cut_texts"]) == (0, 0)
    assert {"top1", "top5", "mean_per_class", "matthews"} <= found.keys()
    assert "f1" not in found


def test_two_files_of_one_split_are_not_joined(tuned: DualEncoder, data: str) -> None:
    manifest(Path(data) / "train.jsonl", [{"sentence": "a boat", "label": 1}])
    message = r"SST-2 has two files for the split 'train': train.jsonl and train.tsv; expected one; move the other away"
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"text_probe(data={data},test=dev)")(tuned))
    (Path(data) / "train.jsonl").rename(Path(data) / "test.jsonl")  # nobody asks for that split
    assert dict(parse_task(f"text_probe(data={data},test=dev)")(tuned))["num_test"] == 30


def test_torn_lines_are_counted_and_many_are_an_error(tuned: DualEncoder, tmp_path: Path) -> None:
    rows = sentences(300, 4)
    data = folder(tmp_path / "x", train=rows[:200], dev=rows[200:])
    with (tmp_path / "x" / "train.tsv").open("a") as file:
        file.write("no label\n\t1\n")
    found = dict(parse_task(f"text_probe(data={data},test=dev,max_texts=60)")(tuned))
    assert (found["num_malformed"], found["num_test"]) == (2, 60)
    with (tmp_path / "x" / "train.tsv").open("a") as file:
        file.write("no label\n")
    with pytest.raises(ValueError, match=r"train.tsv line 202: 3 of 203 lines of .* have not as many cells"):
        dict(parse_task(f"text_probe(data={data},test=dev)")(tuned))


def test_long_texts_are_cut_at_the_context_and_counted(tuned: DualEncoder, tmp_path: Path) -> None:
    rows = [(f"{'a ' * 30}{text}", label) for text, label in sentences(40, 5)]
    data = folder(tmp_path / "x", train=rows[:20], test=rows[20:])
    assert dict(parse_task(f"text_probe(data={data})")(tuned))["num_cut_texts"] == 40
    rows = [(f"{text}{' a' * 3}", label) for text, label in sentences(40, 5)]
    data = folder(tmp_path / "x", train=rows[:20], test=rows[20:])
    assert dict(parse_task(f"text_probe(data={data})")(tuned))["num_cut_texts"] == 0
    assert dict(parse_task(f"text_probe(data={data},max_tokens=6)")(tuned))["num_cut_texts"] == 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"split test has no label; it has: index, sentence; expected a column label or .*use dev"),
        ("test=devv", r"has no split 'devv'; it has: dev, test, train. Did you mean 'dev'"),
        ("test=dev,text=sentense", r"has no column 'sentense'; it has: sentence, label. Did you mean 'sentence'"),
        ("test=dev,label=lable", r"has no column 'lable'; it has: sentence, label. Did you mean 'label'"),
        ("test=dev,pair=label", "pair=label came without text; expected both columns of a pair"),
        ("test=dev,train=dev", r"the split 'dev' is used twice \(dev, dev\); what is tested must not"),
        ("test=dev,expected=31", "labelled texts to test on: found 30, expected 31; complete the data"),
        ("test=dev,label_from=([a-z]+)_", "has no image; it has: sentence, label; expected a column image"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(tuned: DualEncoder, data: str, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"text_probe(data={data},{spec})" if spec else f"text_probe(data={data})")(tuned))


def test_a_label_out_of_range_is_named_with_its_line(tuned: DualEncoder, tmp_path: Path) -> None:
    rows = sentences(30, 6)
    data = folder(tmp_path / "x", train=rows[:20], test=[*rows[20:], ("a boat", 2)])
    message = r"test.tsv line 12: label '2' of the split 'test' is out of range; the split 'train' has 0, 1; expected"
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"text_probe(data={data})")(tuned))
    (tmp_path / "x" / "test.tsv").write_text("sentence\tlabel\na boat\t0.5\n")
    with pytest.raises(
        ValueError, match=r"test.tsv line 2: label '0.5' is no class; expected a name or a whole number"
    ):
        dict(parse_task(f"text_probe(data={data})")(tuned))
    (tmp_path / "x" / "test.tsv").write_text("sentence\tlabel\na boat\t-1\n")
    with pytest.raises(ValueError, match=r"no line of the split 'test' of .* has a label; expected a class in each"):
        dict(parse_task(f"text_probe(data={data})")(tuned))


# labels of the training and of the test lines, and how many of both are kept back (None: an error)
MARKED: dict[str, tuple[list[Any], list[Any], int | None]] = {
    "two classes": (["-1", "1"], ["-1", "1"], 0),
    "numbers of the hub": ([0, 1, 2, -1], [0, 1, 2, -1], 20),
    "names": (["no", "yes", "-"], ["no", "yes", "-"], 26),
    "plus and minus": (["-", "+"], ["+", "-"], 0),
    "a scale": (["-2", "-1", "1", "2"], ["-2", "-1", "1", "2"], 0),
    "halves": (["-1.0", "1.0"], ["-1.0", "1.0"], 0),
    "either": (["-1", "0", "1"], ["-1", "0", "1"], None),
}


@pytest.mark.parametrize("case", MARKED)
def test_minus_one_is_a_class_where_it_can_be_one(tuned: DualEncoder, tmp_path: Path, case: str) -> None:
    train, test, silent = MARKED[case]
    texts = [text for text, _ in sentences(80, 7)]
    records = [{"text": t, "label": train[i % len(train)], "split": "train"} for i, t in enumerate(texts[:40])]
    records += [{"text": t, "label": test[i % len(test)], "split": "test"} for i, t in enumerate(texts[40:])]
    task = parse_task(f"text_probe(data={manifest(tmp_path / 'x.jsonl', records)})")
    if silent is None:
        message = (
            r"x.jsonl: 14 of 40 lines of the split 'train' have the label -1, the others 0 or 1; expected .*; write"
        )
        with pytest.raises(ValueError, match=message):
            dict(task(tuned))
        return
    found = dict(task(tuned))
    assert found["num_classes"] == len(set(train)) - (1 if silent else 0)
    assert (found["num_unlabelled"], found["num_test"]) == (silent, 40 - silent // 2)


def test_a_split_whose_labels_are_all_minus_one_is_kept_back(tuned: DualEncoder, tmp_path: Path) -> None:
    rows = sentences(30, 8)
    data = folder(tmp_path / "x", train=rows, test=[(text, -1) for text, _ in sentences(10, 9)])
    with pytest.raises(ValueError, match=r"no line of the split 'test' of .* has a label"):
        dict(parse_task(f"text_probe(data={data})")(tuned))
    # a class of the training lines is one of the test lines too
    data = folder(tmp_path / "y", train=[(t, 2 * y - 1) for t, y in rows], test=[(t, -1) for t, _ in sentences(10, 9)])
    found = dict(parse_task(f"text_probe(data={data})")(tuned))
    assert (found["num_classes"], found["num_test"], found["num_unlabelled"]) == (2, 10, 0)


@pytest.mark.parametrize("task", ["text_probe", "finetune(side=text)"])
def test_a_single_class_is_refused(tuned: DualEncoder, tmp_path: Path, task: str) -> None:
    rows = [(text, "-" if label else "good") for text, label in sentences(40, 9)]
    data = folder(tmp_path / "x", train=rows, test=rows[:20])  # type: ignore[arg-type]
    name = task.partition("(")[0]
    spec = f"{task.removesuffix(')')}{',' if '(' in task else '('}data={data})"
    left = sum(label == "good" for _, label in rows[20:])
    silent = sum(label == "-" for _, label in [*rows, *rows[:20]])
    message = (
        rf"{name}: the split 'train' of .* has one class \('good', of {left} examples\), and {silent} lines of the "
        r"data are without a label; expected two classes or more; name another column with label=…"
    )
    assert left > 1 and silent > 1
    with pytest.raises(ValueError, match=message):
        dict(parse_task(spec)(tuned))


@pytest.mark.parametrize("label", [1.5, float("nan"), [1], {"a": 1}])
def test_what_is_no_class_is_named(tuned: DualEncoder, tmp_path: Path, label: Any) -> None:
    rows = [{"text": f"a boat {i}", "label": i % 2, "split": "train"} for i in range(4)]
    data = manifest(tmp_path / "x.jsonl", [*rows, {"text": "red", "label": label, "split": "test"}])
    with pytest.raises(ValueError, match=r"x.jsonl line 5: label .* is no class; expected a name or a whole number"):
        dict(parse_task(f"text_probe(data={data})")(tuned))


def test_knowledge_of_texts_is_compared_before_and_after(
    tuned: DualEncoder, data: str, tiny_vision: str, tiny_text: str
) -> None:
    found = dict(parse_task(f"conserve(text_probe(data={data},test=dev))")(tuned))
    base = DualEncoder.build(tiny_vision, tiny_text, "frozen", projection="linear(dim=16)")
    for model, state in ((base, "before"), (tuned, "after")):
        alone = dict(parse_task(f"text_probe(data={data},test=dev)")(model))
        for key in ("top1", "f1", "matthews", "penalty"):
            assert found[f"text_probe/{key}/{state}"] == pytest.approx(alone[key])
    assert found["num_text_probe/test"] == 30
    assert "text_probe/penalty/kept" not in found


def test_a_run_on_the_demo_towers_works_on_the_command_line(data: str, tmp_path: Path, capsys: Any) -> None:
    run = str(DualEncoder.build().save(tmp_path / "run"))
    spec = f"text_probe(data={data},test=dev)"
    assert main(["evaluate", run, "--json", "--task", spec]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"][spec]
    assert found["top1"] > 60 and found["num_test"] == 30
    assert main(["evaluate", run, "--task", spec]) == 0
    table = capsys.readouterr().out
    for row in ("top1", "mean per class", "f1", "matthews", "penalty", "also in test", "cut texts"):
        assert row in table


@pytest.mark.skipif(not (Path(KIT) / "captions" / "rsicd.jsonl").is_file(), reason="needs LILT_KIT, the kit's folder")
def test_captions_of_the_kit_tell_their_scene() -> None:
    model = lilt.DualEncoder.build(text=f"hf:{KIT}/weights/all-MiniLM-L6-v2", policy="frozen")
    spec = f"text_probe(data={KIT}/captions/rsicd.jsonl,label_from=([a-z]+)_,max_texts=900)"
    found = dict(parse_task(spec)(model))
    # chance is 3 %; a caption may speak of something else than the scene (80.8 % when this was written)
    assert (found["num_classes"], found["num_test"]) == (30, 900)
    assert found["top1"] > 75, found
