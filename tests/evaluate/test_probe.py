"""The probe chooses its penalty on held-out images, never on those it is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lilt import DualEncoder
from lilt.evaluate import Setting, Subject, parse_task
from lilt.evaluate.chosen import hold_out
from lilt.evaluate.logistic import fit_logistic
from lilt.evaluate.parts import Known, Part
from lilt.evaluate.probe import PENALTIES, choose_penalty, fit_probe
from tests.evaluate.conftest import BY_NAME, grey, manifest


def known(rows: int, noise: float, seed: int, wrong: float = 0.0) -> Known:
    """Two classes that differ in the first of 30 features; the others are noise to overfit to."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    features = torch.randn(rows, 30, generator=generator) * noise
    features[:, 0] += 4 * labels - 2.0
    flip = torch.rand(rows, generator=generator) < wrong
    return Known(features, torch.where(flip, 1 - labels, labels))


def test_the_penalty_that_does_best_on_held_out_images_is_chosen() -> None:
    chosen = []
    for wrong in (0.0, 0.2):  # with wrong labels it pays to listen less
        learn, check = known(60, 1.0, 1, wrong), known(400, 1.0, 2)
        penalty, best = choose_penalty(learn, check, 2)
        right = [share_right(learn, check, p) for p in PENALTIES]
        assert penalty == PENALTIES[right.index(max(right))]  # the stronger of equals
        assert max(right) > min(right) + 0.05
        logits = best(check.features)
        assert float((logits.argmax(1) == check.labels).double().mean()) == max(right)
        chosen.append(penalty)
    assert chosen[0] < chosen[1]


def test_of_equal_penalties_the_strongest_is_chosen() -> None:
    learn, check = known(60, 0.1, 1), known(60, 0.1, 2)
    assert {share_right(learn, check, p) for p in PENALTIES} == {1.0}
    assert choose_penalty(learn, check, 2)[0] == PENALTIES[0]


def test_held_out_images_are_learned_in_the_end() -> None:
    learn, check = known(60, 1.0, 1, 0.2), known(40, 1.0, 2)
    penalty, found = fit_probe(learn, check, 2)
    assert penalty == choose_penalty(learn, check, 2)[0]
    features, labels = torch.cat([learn.features, check.features]), torch.cat([learn.labels, check.labels])
    expected = fit_logistic(features, labels, 2, penalty)
    torch.testing.assert_close(found(features).softmax(1), expected(features).softmax(1), rtol=0, atol=1e-5)


def share_right(learn: Known, check: Known, penalty: float) -> float:
    logits = fit_logistic(learn.features, learn.labels, 2, penalty)(check.features)
    return float((logits.argmax(1) == check.labels).double().mean())


def test_each_class_is_held_out_in_part() -> None:
    part = Part([f"{i}.jpg" for i in range(23)], torch.tensor([0] * 15 + [1] * 5 + [2] * 2 + [3]))
    kept, held = hold_out(part)
    assert sorted(kept.items + held.items) == sorted(part.items)
    assert torch.bincount(held.labels, minlength=4).tolist() == [3, 1, 1, 0]
    assert hold_out(part)[1].items == held.items
    for some in (kept, held):
        assert [part.labels[part.items.index(item)].item() for item in some.items] == some.labels.tolist()


def test_single_images_leave_none_to_choose_by() -> None:
    with pytest.raises(ValueError, match="2 training images leave none to choose by; expected at least two"):
        hold_out(Part(["a", "b"], torch.tensor([0, 1])))


def test_the_task_uses_the_validation_split(tuned: DualEncoder, setting: Setting) -> None:
    found = dict(parse_task(f"probe({BY_NAME})")(tuned, setting))
    assert (found["num_train"], found["num_validation"], found["num_test"], found["num_classes"]) == (12, 6, 6, 6)
    assert found["penalty"] in PENALTIES
    assert found["top1"] > 60
    without = dict(parse_task(f"probe({BY_NAME},train=train|val)")(tuned, setting))
    assert (without["num_train"], without["num_validation"]) == (12, 6)  # a fifth of three is one


def test_the_test_split_chooses_nothing(tuned: DualEncoder, setting: Setting, pictures: Path, tmp_path: Path) -> None:
    """Whatever the test labels are, the same classifier is fitted."""
    penalties = []
    for turn in range(2):
        records: list[dict[str, Any]] = []
        for f in sorted(pictures.glob("*[0123].*")):
            split = {"0": "train", "1": "train", "2": "val", "3": "test"}[f.stem[-1]]
            colour = "red" if split == "test" and turn else f.stem[:-1]
            records.append({"image": str(f), "label": colour, "split": split})
        task = parse_task(f"probe(data={manifest(tmp_path / f'{turn}.jsonl', records)})")
        penalties.append(dict(task(tuned, setting))["penalty"])
    assert penalties[0] == penalties[1]


def test_with_knn_each_image_is_seen_once(tuned: DualEncoder, setting: Setting) -> None:
    seen = 0

    def count(module: Any, args: tuple[torch.Tensor]) -> None:
        nonlocal seen
        seen += len(args[0])

    handle = tuned.core.vision.register_forward_pre_hook(count)
    subject = Subject(tuned, setting)
    try:
        for spec in (f"knn(k=3,{BY_NAME})", f"probe({BY_NAME})", f"knn(k=1,{BY_NAME})"):
            dict(parse_task(spec)(subject))
    finally:
        handle.remove()
    assert seen == 24


def test_folders_are_classes(tuned: DualEncoder, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "train", "train", "test")):
        for level, name in ((20, "dark"), (230, "bright")):
            grey(tmp_path / split / name / f"{number}.png", level + 3 * number)
    found = dict(parse_task(f"probe(data={tmp_path})")(tuned))
    assert (found["num_train"], found["num_validation"], found["num_test"]) == (4, 2, 2)
    assert found["top1"] == 100


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            f"probe(val=test,{BY_NAME})",
            r"the split 'test' is used twice \(train, test, test\); what is tested must not",
        ),
        (f"probe(val=train,{BY_NAME})", "the split 'train' is used twice"),
        (f"probe(val=vla,{BY_NAME})", "has no split 'vla'; it has: test, train, val. Did you mean 'val'?"),
    ],
)
def test_what_would_leak_is_an_error(tuned: DualEncoder, setting: Setting, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dict(parse_task(spec)(tuned, setting))
