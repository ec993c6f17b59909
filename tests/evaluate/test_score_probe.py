"""Scores of texts: scikit-learn's ridge regression on features taken one text at a time, chosen without the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from lilt import DualEncoder
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.probe import PENALTIES
from tests.evaluate.test_text_probe import features, sentences

HEAD = "index\tsentence1\tsentence2\tscore"
Pair = tuple[str, str, float]


def pairs(rows: int, seed: int) -> list[Pair]:
    """Scores count how often red is in the first text, twice, and boat in the second."""
    texts = [text for text, _ in sentences(2 * rows, seed)]
    made = zip(texts[::2], texts[1::2], strict=True)
    return [(a, b, float(2 * a.split().count("red") + b.split().count("boat"))) for a, b in made]


def written(folder: Path, **splits: list[Pair]) -> str:
    for name, rows in splits.items():
        lines = [HEAD, *(f"{i}\t{a}\t{b}\t{s:.3f}" for i, (a, b, s) in enumerate(rows))]
        (folder / f"{name}.tsv").write_text("\n".join(lines))
    return str(folder)


def joined(model: DualEncoder, rows: list[Pair]) -> np.ndarray:
    columns = list(zip(*rows, strict=True))
    u, v = (features(model, [str(text) for text in column]).astype(np.float64) for column in columns[:2])
    return np.concatenate([u, v, abs(u - v), u * v], axis=1)


@pytest.fixture
def splits() -> dict[str, list[Pair]]:
    """Two training pairs are in dev too."""
    dev = pairs(30, 2)
    return {"train": [*pairs(90, 1), *dev[:2]], "val": pairs(25, 3), "dev": dev}


def test_it_is_the_ridge_of_scikit_learn(tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]) -> None:
    task = f"score_probe(data={written(tmp_path, **splits)},test=dev)"
    found = dict(parse_task(task)(tuned, Setting(batch_size=7)))
    learn, check, dev = splits["train"][:-2], splits["val"], splits["dev"]

    def fitted(rows: list[Pair], penalty: float) -> Any:
        scale = StandardScaler().fit(joined(tuned, rows))
        line = Ridge(alpha=penalty * len(rows)).fit(scale.transform(joined(tuned, rows)), [row[2] for row in rows])
        return lambda some: line.predict(scale.transform(joined(tuned, some)))

    def score(line: Any, rows: list[Pair]) -> float:
        return float(stats.spearmanr(line(rows), [row[2] for row in rows]).statistic)

    best = max(PENALTIES, key=lambda penalty: score(fitted(learn, penalty), check))
    line = fitted([*learn, *check], best)
    assert found["penalty"] == best
    assert found["spearman"] == pytest.approx(100 * score(line, dev), abs=1e-2)
    assert found["pearson"] == pytest.approx(100 * stats.pearsonr(line(dev), [r[2] for r in dev]).statistic, abs=1e-2)
    assert found["spearman"] > 30
    counts = [found[f"num_{name}"] for name in ("train", "validation", "test", "also_in_test", "unscored")]
    assert counts == [90, 25, 30, 2, 0]


def test_without_a_validation_split_a_fifth_is_chosen_by(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]
) -> None:
    del splits["val"]
    found = dict(parse_task(f"score_probe(data={written(tmp_path, **splits)},test=dev)")(tuned))
    assert [found[f"num_{name}"] for name in ("train", "validation", "test", "also_in_test")] == [72, 18, 30, 2]


def test_what_is_chosen_by_is_not_learned_from(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]
) -> None:
    splits["train"] += splits["val"][:3]
    found = dict(parse_task(f"score_probe(data={written(tmp_path, **splits)},test=dev)")(tuned))
    counts = [found[f"num_{name}"] for name in ("train", "validation", "test", "also_in_test")]
    assert counts == [90, 25, 30, 2]


def test_a_pair_can_be_one_sequence(tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]) -> None:
    data = written(tmp_path, **splits)
    apart, joint = (dict(parse_task(f"score_probe(data={data},test=dev{more})")(tuned)) for more in ("", ",joint=true"))
    assert apart["spearman"] != joint["spearman"]


def test_it_is_compared_before_and_after(tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]) -> None:
    task = f"score_probe(data={written(tmp_path, **splits)},test=dev)"
    found = dict(parse_task(f"conserve({task})")(tuned))
    assert found["score_probe/spearman/after"] == dict(parse_task(task)(tuned))["spearman"]
    assert found["score_probe/spearman/before"] != found["score_probe/spearman/after"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"score_probe: .* has no split 'test'|split 'test'"),
        ("test=train", "the split 'train' is used twice"),
        ("test=dev,score=sorce", "has no column 'sorce'.*Did you mean 'score'"),
        ("test=dev,expected=31", "texts with a score to test on: found 30, expected 31"),
        ("test=flat", "split flat has 1 different scores on 3 lines; expected scores that differ"),
    ],
)
def test_bad_input_is_named(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]], spec: str, message: str
) -> None:
    data = written(tmp_path, **splits, flat=[(a, b, 1.0) for a, b, _ in pairs(3, 5)])
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"score_probe(data={data}{',' * bool(spec)}{spec})")(tuned))
