"""Where a step keeps what it needs twice: the same training wherever that is, and no file stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lilt.config import TrainConfig
from lilt.data import Batches, Store
from lilt.data.order import Order
from lilt.memory import available
from lilt.train import Trainer
from lilt.train.check import check
from lilt.train.feed import ahead, piece_rows
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
    monkeypatch.setattr("lilt.train.shelf.HOST_SHARE", 8 * 3 * 32 * 32 * 4 / available())

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
    """And no signal, which ends the process without a word; a limit on files is a full disk to who writes them."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ValueError, match=r"keeps .* GiB on disk in .*spill-0.*free; expected place.*--spill off"):
            Shelf(tmp_path, "disk").put(torch.ones(9999))
        with pytest.raises(ValueError, match=r"rows.bin needs .* GiB, and .* free there .*; expected place.*reuse=off"):
            Store(tmp_path / "store", 99, [999])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_of_somebody_else_stays(tmp_path: Path) -> None:
    mine = tmp_path / "spill-0" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with Shelf(tmp_path, "off") as shelf:
        shelf.put(torch.ones(3))
    with Shelf(tmp_path, "disk") as shelf:
        shelf.put(torch.ones(3))
        assert len(list(shelf.folder.iterdir())) == 2
    assert [file.name for file in mine.parent.iterdir()] == ["mine.txt"]


def test_rows_from_a_store_are_kept_like_images(run: Run) -> None:
    shelves: list[Shelf] = []
    options = {**OPTIONS, "policy": "last(1)", "augment": "none", "reuse": "memory"}
    off = run("off", spill="off", **options)
    assert same(off, run("disk", lambda trainer: shelves.append(trainer.shelf), spill="disk", **options))
    assert shelves[0].on_disk > 0


def test_disk_without_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spill=disk came without micro_batch; expected a step in several pieces"):
        check(TrainConfig(spill="disk"))


def test_a_batch_comes_in_few_pieces_of_whole_micro_batches() -> None:
    assert piece_rows(32_768, 64) == 512
    assert piece_rows(4_096, 64) == 64
    assert piece_rows(100, 7) == 7
    assert piece_rows(1_000, 7) == 21
    assert piece_rows(64, None) is None


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_many_small_pieces_leave_few_files_open(run: Run, micro_batch: int) -> None:
    opened: list[int] = []

    def listen(trainer: Trainer) -> None:
        def count(*_: object) -> None:
            opened.append(len(list(Path("/proc/self/fd").iterdir())))

        trainer.core.text.register_forward_hook(count)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files are counted in /proc")
    run("many", listen, policy="layernorm", **{**OPTIONS, "micro_batch": micro_batch, "workers": 1, "max_steps": 3})
    assert max(opened) - min(opened) < 60


def test_workers_prepare_a_batch_ahead_and_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(Order([100_000]), 32_768, piece=512)
    image = 4 * 3 * 32 * 32
    monkeypatch.setattr("lilt.train.feed.AHEAD_SHARE", 32_768 * image * 2 / available())
    assert ahead(batches, 4, (3, 32, 32)) == 16
    monkeypatch.setattr("lilt.train.feed.AHEAD_SHARE", 16_384 * image / available())
    assert 6 <= ahead(batches, 4, (3, 32, 32)) <= 9
    assert ahead(batches, 4, (3, 999, 999)) == 2
