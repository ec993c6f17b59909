"""Bars: each thing that is encoded or fitted moves one, to its end, with one process and with two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lilt import DualEncoder, distributed
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.probe import FITS
from lilt.evaluate.rows import Advance
from tests.evaluate.conftest import BY_NAME
from tests.evaluate.test_text_probe import folder, pairs, sentences


@dataclass
class Seen:
    """The bars that were shown, in order: name, total, and the moves."""

    bars: list[tuple[str, int, list[int]]] = field(default_factory=list)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Advance]:
        moves: list[int] = []
        self.bars.append((name, total, moves))
        yield moves.append

    def totals(self, processes: int = 1) -> dict[str, int]:
        """The totals by name, of bars that went to their end."""
        assert all(processes * sum(moves) == total for _, total, moves in self.bars), self.bars
        return {name: total for name, total, _ in self.bars}


def shown(model: DualEncoder, spec: str, setting: Setting | None = None) -> Seen:
    seen = Seen()
    dict(parse_task(spec)(model, replace(setting or Setting(), bar=seen.bar, batch_size=5)))
    return seen


@pytest.fixture
def texts(tmp_path: Path) -> str:
    rows = sentences(60, 1)
    return folder(tmp_path / "x", train=rows[:30], val=rows[30:40], test=rows[40:])


def test_texts_and_fits_of_a_probe_are_shown(tuned: DualEncoder, texts: str) -> None:
    seen = shown(tuned, f"text_probe(data={texts})")
    assert seen.totals() == {"text_probe: texts": 60, "text_probe: fits": FITS}
    assert [len(moves) for _, _, moves in seen.bars] == [12, FITS]  # batch by batch, fit by fit


def test_the_fits_of_a_probe_of_images_are_shown(tuned: DualEncoder, setting: Setting) -> None:
    totals = shown(tuned, f"probe({BY_NAME})", setting).totals()
    assert totals == {"probe: train": 12, "probe: validation": 6, "probe: test": 6, "probe: fits": FITS}


def test_texts_that_are_compared_are_shown(tuned: DualEncoder, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs", test=20)
    texts = {t for line in (tmp_path / "pairs" / "test.tsv").read_text().splitlines()[1:] for t in line.split("\t")[:2]}
    assert shown(tuned, f"similarity(data={data},score=label)").totals() == {"similarity: texts": len(texts)}


def test_prompts_and_captions_are_shown(tuned: DualEncoder, setting: Setting) -> None:
    totals = shown(tuned, f"zeroshot({BY_NAME},templates=openai80)", setting).totals()
    assert totals == {"zero-shot: prompts of 6 of 6 classes": 480, "zero-shot": 6}
    for spec in ("retrieval", "retrieval(score=late)"):
        totals = shown(tuned, spec, setting).totals()
        assert totals["retrieval: images"] == 6 and totals["retrieval: captions"] > 6
    assert shown(tuned, "drift(samples=8)", setting).totals() == {"drift": 6, "drift: texts": 8}


@pytest.mark.parametrize("side", ["vision", "text"])
def test_each_look_of_fine_tuning_is_shown(tuned: DualEncoder, setting: Setting, texts: str, side: str) -> None:
    data = f"data={texts}" if side == "text" else BY_NAME
    seen = shown(tuned, f"finetune(side={side},{data},epochs=2,batch_size=4)", None if side == "text" else setting)
    held, test = (10, 20) if side == "text" else (6, 6)
    steps = 2 * (30 // 4) if side == "text" else 2 * (12 // 4)
    assert seen.totals() == {"finetune": steps, "finetune: validation": held, "finetune: test": test}
    assert [name for name, _, _ in seen.bars] == ["finetune", *["finetune: validation"] * 2, "finetune: test"]


def test_what_each_process_does_by_itself_ends_at_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar moves as if all were as far as this one: of two processes each move counts twice."""
    seen = Seen()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with Setting(bar=seen.bar).alone("fits", 7) as advance:
        for _ in range(7):
            advance(1)
    assert seen.totals(processes=2) == {"fits": 14}
