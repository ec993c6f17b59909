"""Where a step keeps what it needs twice: the same training wherever that is, and no file stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lilt.data import Batches
from lilt.data.order import Order
from lilt.train import Trainer
from lilt.train.feed import ahead
from lilt.train.shelf import Shelf
from tests.train.conftest import Finished, Run

# with a front in both towers, in one, and in none
POLICIES = ["last(1)", "lit", "layernorm"]
OPTIONS: dict[str, Any] = {"batch_size": 12, "micro_batch": 5, "epochs": 4, "eval_every": 4, "lr": 0.01}


def same(one: Finished, other: Finished) -> bool:
    return (one.folder / "adapter.safetensors").read_bytes() == (other.folder / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_on_disk_a_run_ends_in_the_same_bits(run: Run, policy: str, workers: int) -> None:
    shelves: list[Shelf] = []

    def listen(trainer: Trainer) -> None:
        shelves.append(trainer.shelf)

    off = run("off", spill="off", policy=policy, workers=workers, **OPTIONS)
    disk = run("disk", listen, spill="disk", policy=policy, workers=workers, **OPTIONS)
    assert same(off, disk)
    pictures = 12 * 3 * 32 * 32 * 4
    assert shelves[0].on_disk == pictures if policy == "layernorm" else shelves[0].on_disk > pictures
    assert not list(disk.folder.glob("spill*"))


def test_auto_goes_to_disk_where_memory_is_short(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run("plain", policy="last(1)", **OPTIONS)
    said: list[str] = []
    # place for some of the images of a step and no more
    monkeypatch.setattr("lilt.train.shelf.HOST_SHARE", 8 * 3 * 32 * 32 * 4 / psutil.virtual_memory().available)

    def listen(trainer: Trainer) -> None:
        monkeypatch.setattr(trainer.log, "say", said.append)

    assert same(plain, run("short", listen, policy="last(1)", **OPTIONS))
    told = [line for line in said if "on disk" in line]
    assert len(told) == 1 and "spill-0" in told[0]


def test_fronts_can_be_kept_in_half_precision(run: Run) -> None:
    exact, half = (run(str(d), policy="last(1)", spill="disk", reuse_dtype=d, **OPTIONS) for d in (None, "bf16"))
    assert not same(exact, half)
    left, right = exact.model.trained(), half.model.trained()
    for name, value in left.items():
        # nine steps of lr 0.01, and bf16 has eight bits
        torch.testing.assert_close(right[name], value, rtol=0.05, atol=0.02, msg=name)


def test_a_shelf_gives_back_what_it_got_and_uses_its_files_again(tmp_path: Path) -> None:
    with Shelf(tmp_path, "disk") as shelf:
        for step in range(3):
            shelf.clear()
            given = [torch.randn(4 + step, 3), torch.randint(9, (5,)), torch.zeros(0, 7), torch.randn(2, 2).bfloat16()]
            kept = [shelf.put(tensor.clone()) for tensor in given]
            for one, other in zip(given, kept, strict=True):
                assert torch.equal(one, other) and one.dtype == other.dtype
            assert len(list(shelf.folder.iterdir())) == 3
            assert shelf.on_disk == sum(tensor.nbytes for tensor in given)
    assert not shelf.folder.exists()


def test_a_disk_that_is_full_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "spill-0").mkdir()
    (tmp_path / "spill-0" / "0.bin").mkdir()  # what cannot be written to
    with pytest.raises(ValueError, match=r"keeps .* GiB on disk in .*spill-0.*free; expected place.*--batch_size"):
        Shelf(tmp_path, "disk").put(torch.ones(3))


def test_workers_prepare_a_batch_ahead_and_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(Order([100_000]), 32_768, piece=64)
    image = 4 * 3 * 32 * 32
    monkeypatch.setattr("lilt.train.feed.AHEAD_SHARE", 32_768 * image * 2 / psutil.virtual_memory().available)
    assert ahead(batches, 4, (3, 32, 32)) == 128
    monkeypatch.setattr("lilt.train.feed.AHEAD_SHARE", 4_096 * image / psutil.virtual_memory().available)
    assert 14 <= ahead(batches, 4, (3, 32, 32)) <= 18
    assert ahead(batches, 4, (3, 999, 999)) == 2
