"""Similarity: correlations of cosines with scores, against scipy on features taken one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from lilt import DualEncoder
from lilt.evaluate import Setting, parse_task
from tests.evaluate.test_text_probe import features, sentences

HEAD = "index\tgenre\tsentence1\tsentence2\tscore"


@pytest.fixture
def pairs() -> list[tuple[str, str, float]]:
    """Scores count the words that two texts share; some pairs are equal and tie."""
    texts = [text for text, _ in sentences(80, 8)]
    made = [(a, b, float(len(set(a.split()) & set(b.split())))) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    return [*made, *((a, a, 5.0) for a, _, _ in made[:3])]


@pytest.fixture
def data(tmp_path: Path, pairs: list[tuple[str, str, float]]) -> str:
    lines = [HEAD, *(f"{i}\tnews\t{a}\t{b}\t{s:.3f}" for i, (a, b, s) in enumerate(pairs))]
    (tmp_path / "dev.tsv").write_text("\n".join(lines))
    return str(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 9])
def test_correlations_are_those_of_scipy(tuned: DualEncoder, data: str, pairs: Any, batch_size: int) -> None:
    found = dict(parse_task(f"similarity(data={data},split=dev)")(tuned, Setting(batch_size=batch_size)))
    u, v = (features(tuned, [pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
    cosines = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    cosines[-3:] = 1  # equal texts tie
    said = [score for _, _, score in pairs]
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(cosines, said).statistic, abs=1e-3)
    assert found["pearson"] == pytest.approx(100 * stats.pearsonr(cosines, said).statistic, abs=1e-3)
    assert found["spearman"] > 10
    assert (found["num_pairs"], found["num_unscored"], found["num_cut_texts"]) == (43, 0, 0)


def test_it_is_compared_before_and_after(tuned: DualEncoder, data: str) -> None:
    task = f"similarity(data={data},split=dev)"
    found = dict(parse_task(f"conserve({task})")(tuned))
    after = dict(parse_task(task)(tuned))
    assert found["similarity/spearman/after"] == after["spearman"] != found["similarity/spearman/before"]
    assert found["num_similarity/pairs"] == 43


def test_the_demo_tower_finds_equal_words_alike(data: str) -> None:
    found = dict(parse_task(f"similarity(data={data}/dev.tsv)")(DualEncoder.build()))
    assert found["spearman"] > 10
    assert found["num_pairs"] == 43


@pytest.mark.parametrize(
    ("line", "spec", "message"),
    [
        ("0\tx\ta\tb\tmany", "", r"dev.tsv line 45: score 'many' is no number; expected one; mend it"),
        ("0\tx\ta\tb\tnan", "", r"dev.tsv line 45: score 'nan' is no number"),
        ("", "score=sorce", r"has no column 'sorce'; it has: index, genre, .*score. Did you mean 'score'"),
        ("", "text=sentence1", r"has single texts; expected two a line"),
        ("", "expected=44", "pairs with a score: found 43, expected 44"),
        ("", "score=genre", r"line 2: genre 'news' is no number"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tuned: DualEncoder, data: str, line: str, spec: str, message: str) -> None:
    with (Path(data) / "dev.tsv").open("a") as file:
        file.write(f"\n{line}" if line else "")
    with pytest.raises(ValueError, match=message):
        dict(parse_task(f"similarity(data={data},split=dev{',' * bool(spec)}{spec})")(tuned))


def test_scores_that_are_all_the_same_are_an_error(tuned: DualEncoder, tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("sentence1,sentence2,label\na,b,-1\nc,d,-1\n")
    with pytest.raises(
        ValueError, match=r"has 1 different scores on 2 pairs; expected scores that differ; name another"
    ):
        dict(parse_task(f"similarity(data={file})")(tuned))
