"""A step that runs out of memory is done again in smaller pieces; the run ends as if it had had them from the start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lilt import checkpoint
from lilt.train import RunLog, Trainer, read_metrics
from lilt.train.place import Place
from tests.train import hungry
from tests.train.conftest import Run, Wish

# dropout in both towers
OPTIONS: dict[str, Any] = {"vision": "py:tests.train.hungry:vision", "policy": "full", "batch_size": 12, "epochs": 4}
# captions of one length: pieces that come from the loader are padded each for itself, and padding changes the last bits
OPTIONS["train_tokens"] = 4


@pytest.fixture(autouse=True)
def appetite() -> Iterator[hungry.Appetite]:
    plain = vars(hungry.Appetite())
    yield hungry.APPETITE
    vars(hungry.APPETITE).update(plain)


def assert_same(one: Path, two: Path) -> None:
    tensors = [load_file(folder / checkpoint.ADAPTER) for folder in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    losses = [[r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in (one, two)]
    assert losses[0] == losses[1]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(RunLog, "say", lambda _, line: lines.append(line))
    return lines


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ["device", "host"])
def test_the_result_is_that_of_the_smaller_size_from_the_start(
    run: Run, appetite: hungry.Appetite, said: list[str], where: str, error: str
) -> None:
    small = run("small", micro_batch=3, **OPTIONS)
    appetite.fits, appetite.where, appetite.error = 4, where, error
    shrunk = run("shrunk", **OPTIONS)
    assert appetite.refusals == [12, 6]  # in the first step; no other meets them again
    assert shrunk.outcome.place.micro_batch == 3
    assert_same(small.folder, shrunk.folder)
    told = [line for line in said if "out of memory" in line]
    assert len(told) == 2
    assert told[0].startswith("step 1 ran out of memory (")
    assert told[1].endswith("it is done again with 3 pairs at once, and so are all others from now on")


def test_whole_and_small_steps_differ_in_bits(run: Run) -> None:
    """So that the comparison above can see something."""
    whole, small = (run(name, micro_batch=size, **OPTIONS) for name, size in (("whole", None), ("small", 3)))
    with pytest.raises(AssertionError):
        assert_same(whole.folder, small.folder)


def test_a_later_step_goes_on_from_what_was_learnt(run: Run, appetite: hungry.Appetite) -> None:
    def starve(trainer: Trainer) -> None:
        def look(*_: object) -> None:
            appetite.fits = 12 if trainer.place.step < 2 or not trainer.core.training else 6

        trainer.core.vision.register_forward_pre_hook(look)

    done = run(wish=starve, **OPTIONS)
    assert done.outcome.finished
    assert appetite.refusals == [12]
    assert done.outcome.place.step == 4


def interrupt_once_at(step: int) -> Wish:
    """A second signal would end the run at once, and a step of pieces has several forwards."""
    sent: list[int] = []

    def wish(trainer: Trainer) -> None:
        def ask(*_: object) -> None:
            if trainer.place.step == step - 1 and trainer.core.training and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGINT)

        trainer.core.text.register_forward_hook(ask)

    return wish


def test_the_size_is_kept_over_a_stop(run: Run, appetite: hungry.Appetite) -> None:
    small = run("small", micro_batch=3, **OPTIONS)
    appetite.fits = 4
    assert not run("shrunk", wish=interrupt_once_at(2), **OPTIONS).outcome.finished
    again = run("shrunk", resume=True, **OPTIONS)
    assert again.outcome.finished
    assert appetite.refusals == [12, 6]
    assert_same(small.folder, again.folder)


def test_a_run_that_goes_on_with_smaller_pieces_has_to_prove_them(run: Run, appetite: hungry.Appetite) -> None:
    assert not run("one", wish=interrupt_once_at(3), **OPTIONS).outcome.finished
    appetite.fits = 3
    again = run("one", resume=True, micro_batch=3, **OPTIONS)
    assert again.outcome.finished
    assert appetite.refusals == []
    assert (again.outcome.place.micro_batch, again.outcome.place.proved) == (3, 1)  # the last of four steps


def test_a_run_stays_with_the_smaller_pieces_that_it_went_on_with(run: Run, appetite: hungry.Appetite) -> None:
    assert not run("one", wish=interrupt_once_at(2), **OPTIONS).outcome.finished
    appetite.fits = 3
    assert not run("one", wish=interrupt_once_at(3), resume=True, micro_batch=3, **OPTIONS).outcome.finished
    assert run("one", resume=True, **OPTIONS).outcome.place.micro_batch == 3
    assert appetite.refusals == []


def test_a_single_pair_that_does_not_fit_ends_the_run(run: Run, appetite: hungry.Appetite) -> None:
    appetite.fits = 0
    message = (
        r"step 1 ran out of memory \(.*12 GiB|1 GiB.*\) with one pair at once; expected memory for one; use --check"
    )
    with pytest.raises(ValueError, match=message):
        run(**OPTIONS)
    assert appetite.refusals == [12, 6, 3, 1]


def test_other_errors_pass(run: Run) -> None:
    def wish(trainer: Trainer) -> None:
        def fail(*_: object) -> None:
            if trainer.core.training:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        trainer.core.vision.register_forward_pre_hook(fail)

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(wish=wish, **OPTIONS)


def test_states_from_before_have_no_size() -> None:
    place = Place()
    place.load_state_dict({"step": 7, "best": 1.0, "best_step": 5})
    assert (place.step, place.micro_batch, place.proved) == (7, None, 0)
