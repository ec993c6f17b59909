"""Fine-tuning for scores: it learns on a copy, whatever their scale, and nothing is chosen on the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilt import DualEncoder
from lilt.cli import main
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.parts import Part
from lilt.evaluate.score_finetune import squared, standardised
from tests.evaluate.test_score_probe import Pair, pairs, written

RECIPE = "test=dev,policy=full,lr=1e-3,head_lr=0.01,batch_size=16"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    """Two training pairs are in dev too."""
    dev = pairs(60, 2)
    return {"train": [*pairs(300, 1), *dev[:2]], "val": pairs(60, 3), "dev": dev}


def run(model: DualEncoder, data: str, more: str = RECIPE, setting: Setting | None = None) -> dict[str, float]:
    return dict(parse_task(f"score_finetune(data={data},{more})")(model, setting))


def test_it_learns_on_a_copy_and_the_numbers_add_up(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]
) -> None:
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    data, stream = written(tmp_path, **splits), torch.get_rng_state()
    cosines = dict(parse_task(f"similarity(data={data},split=dev)")(tuned))["spearman"]
    found = run(tuned, data, f"{RECIPE},epochs=10")
    assert abs(cosines) < 30
    assert found["spearman"] > 70
    assert found["pearson"] > 70
    assert 1 <= found["best_epoch"] <= 10
    assert found["num_trained"] == sum(p.numel() for p in tuned.core.text.parameters())
    counts = [found[f"num_{name}"] for name in ("train", "validation", "test", "also_in_test", "unscored", "malformed")]
    assert counts == [300, 60, 60, 2, 0, 0]
    assert torch.equal(torch.get_rng_state(), stream)
    after = tuned.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_loss_is_the_squared_distance_from_standardised_scores() -> None:
    part = standardised(Part([("a",), ("b",), ("c",), ("d",)], torch.tensor([1.0, 2.0, 3.0, 6.0]).double()))
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]).double() / 3.5**0.5
    torch.testing.assert_close(part.labels, expected)
    found: Tensor = torch.tensor([[0.0], [0.5]])
    assert float(squared(found, torch.tensor([1.0, -0.5]))) == pytest.approx((1 + 1) / 2)


def test_another_scale_of_the_scores_is_learned_alike(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]
) -> None:
    wide = {name: [(a, b, 20 * score - 7) for a, b, score in rows] for name, rows in splits.items()}
    for name in ("plain", "wide"):
        (tmp_path / name).mkdir()
    plain, scaled = (run(tuned, written(tmp_path / n, **s)) for n, s in (("plain", splits), ("wide", wide)))
    assert scaled == pytest.approx(plain, abs=0.5)


def test_the_same_seed_finds_the_same_and_another_not(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]
) -> None:
    data = written(tmp_path, **splits)
    first = run(tuned, data, f"{RECIPE},policy=lora(r=2)".replace("policy=full,", ""))
    again = run(tuned, data, f"{RECIPE},policy=lora(r=2)".replace("policy=full,", ""), Setting(batch_size=7, workers=1))
    other = run(tuned, data, f"{RECIPE},policy=lora(r=2),seed=1".replace("policy=full,", ""))
    assert again == pytest.approx(first, abs=1e-4)
    assert other["pearson"] != first["pearson"]


def test_the_test_split_chooses_nothing(tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]) -> None:
    turned = splits | {"dev": [(a, b, -score) for a, b, score in splits["dev"]]}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (
        run(tuned, written(tmp_path / n, **s), f"{RECIPE},epochs=4") for n, s in (("one", splits), ("two", turned))
    )
    assert one["best_epoch"] == two["best_epoch"]
    assert one["pearson"] == pytest.approx(-two["pearson"], abs=1e-3)


def test_a_pair_can_be_one_sequence_and_texts_can_be_single(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]]
) -> None:
    data = written(tmp_path, **splits)
    joint, single = (run(tuned, data, f"{RECIPE},epochs=1,{more}") for more in ("joint=true", "text=sentence1"))
    assert joint["num_train"] == 300
    # one text has one of two scores of a pair; those that are tested are left out by their text
    assert single["num_test"] == 60
    assert joint["pearson"] != single["pearson"]


def test_it_is_compared_before_and_after_on_the_command_line(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]], capsys: Any
) -> None:
    folder = tuned.save(tmp_path / "run")
    (tmp_path / "sts").mkdir()
    task = f"score_finetune(data={written(tmp_path / 'sts', **splits)},{RECIPE},epochs=1)"
    assert main(["evaluate", str(folder), "--workers=0", "--json", "--task", f"conserve({task})"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tasks"].values()
    assert found["score_finetune/spearman/after"] == pytest.approx(dict(parse_task(task)(tuned))["spearman"], abs=1e-3)
    assert found["score_finetune/spearman/before"] != found["score_finetune/spearman/after"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("policy=layernrom", "unknown policy 'layernrom'; known: .*Did you mean 'layernorm'"),
        ("epochs=0", "score_finetune: epochs=0; expected more than 0"),
        ("test=train", "the split 'train' is used twice"),
        ("test=dev,expected=61", "texts with a score to test on: found 60, expected 61"),
        ("test=dev,val=flat", "split flat has 1 different scores on 3 lines; expected scores that differ"),
        ("test=dev,val=double", "300 lines are left to learn from and 0 to choose by, .*; expected different scores"),
        ("test=dev,policy=full,lr=1e30", "the loss of fine-tuning is (nan|inf); expected a finite one"),
    ],
)
def test_bad_settings_are_named(
    tuned: DualEncoder, tmp_path: Path, splits: dict[str, list[Pair]], spec: str, message: str
) -> None:
    flat = [(a, b, 1.0) for a, b, _ in pairs(3, 5)]
    data = written(tmp_path, **splits, flat=flat, double=splits["dev"][:4])
    with pytest.raises(ValueError, match=message):
        run(tuned, data, spec)
