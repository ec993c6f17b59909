"""Training works on a set that can be learnt, writes what it says, and changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lilt import checkpoint, load
from lilt.build import build_model, build_splits
from lilt.data import Sample
from lilt.evaluate import evaluate_retrieval
from lilt.train import Trainer, read_metrics
from tests.train.conftest import Run, Wish


@pytest.mark.parametrize("policy", ["layernorm", "lora(r=4)"])
def test_a_set_that_can_be_learnt_is_learnt(run: Run, settings: dict[str, Any], policy: str) -> None:
    towers = {side: f"{settings[side]}?pool=mean" for side in ("vision", "text")}
    done = run(policy=policy, epochs=60, batch_size=12, lr=1e-2, head_lr=1e-2, eval_every=60, **towers)
    losses = [r["loss"] for r in read_metrics(done.folder) if "loss" in r]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    test = build_splits(done.config).test
    before, after = (evaluate_retrieval(m, test) for m in (build_model(done.config), done.model))
    found = [sum(r[side]["R@1"] for side in ("text_to_image", "image_to_text")) / 2 for r in (before, after)]
    # six colours, so chance is 17; no picture of the test split was seen
    assert found[0] < 40
    assert found[1] >= 50


def test_frozen_tensors_stay_bit_for_bit(run: Run) -> None:
    done = run(policy="layernorm", epochs=2)
    fresh = build_model(done.config)
    trained = done.model.trained()
    assert trained
    for name, tensor in done.model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]) == (name not in trained), name


def test_metrics_tell_each_step_and_each_validation(run: Run) -> None:
    done = run(epochs=2, log_every=1)
    records = read_metrics(done.folder)
    steps = [r for r in records if "split" not in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert [r["epoch"] for r in steps] == [0.5, 1.0, 1.5, 2.0]
    for record in steps:
        assert {"loss", "image_to_text", "text_to_image", "scale", "lr", "pairs_per_second"} <= record.keys()
        assert record["loss"] == pytest.approx((record["image_to_text"] + record["text_to_image"]) / 2, rel=1e-5)
    vals = [r for r in records if r.get("split") == "val"]
    assert [r["step"] for r in vals] == [2, 4]
    assert {"mean_recall", "text_to_image/R@1", "image_to_text/median_rank"} <= vals[0].keys()
    assert done.outcome.finished
    assert done.outcome.peak_bytes > 0
    assert done.outcome.pairs_per_second > 0


def test_the_kept_checkpoint_is_the_best_by_validation(run: Run) -> None:
    done = run(epochs=6, head_lr=2e-2)
    recalls = {r["step"]: r["mean_recall"] for r in read_metrics(done.folder) if r.get("split") == "val"}
    best = max(recalls, key=lambda step: recalls[step])  # the first of equals
    contract = checkpoint.read_contract(done.folder)
    assert contract["metrics"]["step"] == done.outcome.place.best_step == best
    again = load(done.folder).core
    assert evaluate_retrieval(again, build_splits(done.config).val)["mean_recall"] == pytest.approx(recalls[best])


def test_a_worse_validation_replaces_nothing(run: Run) -> None:
    scores = iter([5.0, 9.0, 7.0])
    done = run(epochs=3, wish=lambda t: setattr(t, "validate", lambda core: [("mean_recall", next(scores))]))
    assert done.outcome.place.best_step == 4
    assert checkpoint.read_contract(done.folder)["metrics"] == {"step": 4.0, "mean_recall": 9.0}


def test_without_validation_the_newest_is_kept(run: Run) -> None:
    done = run(epochs=2, val_split="none")
    assert checkpoint.read_contract(done.folder)["metrics"] == {"step": 4.0}
    assert not [r for r in read_metrics(done.folder) if "split" in r]
    saved = load(done.folder).core.trained()
    assert all(torch.equal(p, saved[name]) for name, p in done.model.trained().items())


def test_bf16_runs_and_keeps_fp32_masters(run: Run) -> None:
    done = run(epochs=3, precision="bf16")
    plain = run("plain", epochs=3)
    assert {p.dtype for p in done.model.trained().values()} == {torch.float32}
    losses = [[r["loss"] for r in read_metrics(d.folder) if "loss" in r] for d in (done, plain)]
    assert losses[0] != losses[1]  # it did run in another precision
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_the_scale_stays_in_its_range(run: Run) -> None:
    done = run(epochs=3, scale=14.0, scale_min=13.9, scale_max=14.1, head_lr=0.5)
    scales = [r["scale"] for r in read_metrics(done.folder) if "scale" in r]
    assert all(13.9 * 0.9999 <= s <= 14.1 * 1.0001 for s in scales)
    assert any(s == pytest.approx(14.1) or s == pytest.approx(13.9) for s in scales)


@pytest.mark.parametrize("same", ["positive", "ignored", "negative"])
def test_every_way_with_equal_pairs_trains(run: Run, same: str) -> None:
    assert run(epochs=1, same=same, captions="all").outcome.finished


def with_bad(pictures: Path, folder: Path, count: int) -> list[Sample]:
    good = [Sample(p, ("a red picture",), "train") for p in sorted(pictures.glob("*.png"))]
    bad = [folder / f"bad{i}.png" for i in range(count)]
    for file in bad:
        file.write_bytes(b"no picture")
    return good + [Sample(file, ("a boat",), "train") for file in bad]


def test_a_few_bad_images_are_listed_once(run: Run, pictures: Path, tmp_path: Path) -> None:
    samples = with_bad(pictures, tmp_path, 2)
    done = run(epochs=3, batch_size=7, samples=samples, max_bad_share=0.2, eval_every=9)
    assert done.outcome.bad_images == 2
    listed = [json.loads(line) for line in (done.folder / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(r["image"] for r in listed) == [str(tmp_path / f"bad{i}.png") for i in range(2)]
    assert all("UnidentifiedImageError" in r["reason"] for r in listed)


def test_too_many_bad_images_stop_the_run(run: Run, pictures: Path, tmp_path: Path) -> None:
    message = r"\d of 16 training images could not be read, more than max_bad_share=0.1 .*bad_images.jsonl: mend"
    with pytest.raises(ValueError, match=message):
        run(epochs=3, batch_size=8, samples=with_bad(pictures, tmp_path, 4), max_bad_share=0.1)


def poison_at(step: int) -> Wish:
    """Break a weight in the middle of a step."""

    def wish(trainer: Trainer) -> None:
        def spoil(*_: object) -> None:
            if trainer.place.step == step - 1 and trainer.core.training:
                trainer.core.projection.vision.weight.data.fill_(float("nan"))

        trainer.core.vision.register_forward_pre_hook(spoil)

    return wish


@pytest.mark.parametrize("val_split", ["val", "none"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    run: Run, tmp_path: Path, val_split: str
) -> None:
    message = (
        r"no longer finite at step 6\. The best checkpoint so far \(step [24]\) and the last state .* kept: .*--lr"
    )
    with pytest.raises(ValueError, match=message):
        run(epochs=5, wish=poison_at(5), val_split=val_split, log_every=100)
    assert checkpoint.read_contract(tmp_path / "run")["metrics"]["step"] in (2, 4)
    assert_finite(tmp_path / "run")
    assert run(epochs=5, val_split=val_split, resume=True).outcome.finished


def test_weights_broken_by_the_last_update_are_never_saved(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(is no longer finite at|in a row, the last one) step \d"):
        run(epochs=3, head_lr=1e38, val_split="none")
    assert_finite(tmp_path / "run")


def assert_finite(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
