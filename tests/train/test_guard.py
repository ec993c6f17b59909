"""A step without a finite gradient changes nothing, is counted and explained; several in a row end the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilt.train import Trainer, read_metrics
from lilt.train.guard import Guard
from tests.train.conftest import Run, Wish

FINE, BROKEN = torch.tensor([False, False]), torch.tensor([False, True])
IDS = torch.tensor([2, 0])


def optimizer(kind: str) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.ones(3))
    if kind == "sgd":
        return torch.optim.SGD([weight], lr=0.1), weight
    return torch.optim.AdamW([weight], lr=0.1, fused=kind == "fused"), weight


@pytest.mark.parametrize("kind", ["fused", "plain", "sgd"])
def test_a_bad_step_leaves_weights_and_moments_alone(kind: str) -> None:
    tuner, weight = optimizer(kind)
    twin, other = optimizer(kind)
    guard = Guard(3, ["a.png", "b.png", "c.png"])
    gradients = [torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([-1.0, 0.5, 2.0])]
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        guard.step(tuner, step, gradient.norm(), FINE, IDS)
        if step != 2:
            other.grad = gradient.clone()
            twin.step()
    assert torch.equal(weight, other)
    said = guard.settle("all is kept")
    assert said == [
        "step 2 was left out: its gradient is not finite; all embeddings of its batch are, so it broke on the way back"
    ]
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert guard.settle("all is kept") == []


def note(guard: Guard, step: int, good: bool, broken: Tensor = FINE) -> None:
    guard.note(step, torch.tensor(good), broken, IDS)


def test_the_rows_are_named() -> None:
    guard = Guard(3, ["a.png", "b.png", "c.png"])
    note(guard, 7, good=False, broken=BROKEN)
    note(guard, 8, good=False, broken=~FINE)
    one, all_of_them = guard.settle("")
    assert one.endswith("1 of 2 rows of its batch are broken: a.png")
    assert "all 2 rows of its batch, which points at the weights" in all_of_them


def test_several_in_a_row_end_the_run_and_a_good_one_between_does_not() -> None:
    guard = Guard(2, ["a.png", "b.png", "c.png"])
    for step, good in enumerate([False, True, False, True], start=1):
        note(guard, step, good)
    assert len(guard.settle("")) == 2
    note(guard, 5, good=False)
    guard.settle("")
    state = guard.state_dict()
    assert state == {"skipped": 3, "in_a_row": 1}
    again = Guard(2, guard.names)
    again.load_state_dict(state)
    note(again, 6, good=False)
    with pytest.raises(ValueError, match=r"in 2 steps in a row, the last one step 6; .*\. All is kept: start again"):
        again.settle("All is kept")


def spoil(steps: set[int], row: int) -> Wish:
    """Break what the vision tower says of one row in some steps."""

    def wish(trainer: Trainer) -> None:
        def change(_module: Any, _args: Any, output: Tensor) -> Tensor | None:
            if trainer.place.step + 1 not in steps or not trainer.core.training:
                return None
            mask = torch.zeros(len(output), 1)
            mask[row] = float("nan")
            return output + mask

        trainer.core.vision.register_forward_hook(change)

    return wish


def test_a_run_goes_on_and_tells(run: Run) -> None:
    done = run(epochs=3, wish=spoil({2, 4}, row=1))
    assert done.outcome.finished
    steps = {r["step"]: r for r in read_metrics(done.folder) if "loss" in r}
    assert [steps[s]["skipped_steps"] for s in range(1, 7)] == [0, 1, 1, 2, 2, 2]
    assert steps[2]["loss"] is None
    assert all(steps[s]["loss"] > 0 for s in (1, 3, 5, 6))
    assert all(p.isfinite().all() for p in done.model.trained().values())


def test_a_run_that_is_broken_for_good_stops(run: Run) -> None:
    with pytest.raises(
        ValueError, match=r"in 3 steps in a row, the last one step 4; 1 of 6 rows .*: .*\.(png|jpg)\. The best"
    ):
        run(epochs=9, wish=spoil({2, 3, 4}, row=0), eval_every=9)


def test_how_many_in_a_row_is_a_setting(run: Run) -> None:
    assert run(epochs=3, wish=spoil({2, 3, 4}, row=0), eval_every=9, max_bad_steps=4).outcome.finished
