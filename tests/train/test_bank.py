"""The memory bank against a deque, over random sequences of pushes."""

from __future__ import annotations

import io
import random
from collections import deque

import pytest
import torch
from torch import Tensor

from lilt.train.bank import Bank

WIDTH = 3
Slow = deque[tuple[int, tuple[float, ...]]]


def inside(bank: Bank) -> list[tuple[int, tuple[float, ...]]]:
    """Return (image, row) from the oldest to the newest, read off the buffers."""
    start = bank.pointer if bank.full else 0
    order = [(start + i) % bank.capacity for i in range(bank.filled)]
    return [(int(bank.image_id[i]), tuple(bank.rows[i].tolist())) for i in order]


def draw(dice: random.Random, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """One gathered batch: rows, images (a few come back again and again), and which are real."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    image_id = torch.tensor([dice.randrange(40) for _ in range(rows)])
    return torch.randn(rows, WIDTH, generator=generator), image_id, torch.rand(rows, generator=generator) < 0.8


def push(slow: Slow, rows: Tensor, image_id: Tensor, valid: Tensor | None) -> None:
    for i in range(len(rows)):
        if valid is None or valid[i]:
            slow.append((int(image_id[i]), tuple(rows[i].tolist())))


def saved_and_loaded(bank: Bank, capacity: int, batch: int) -> Bank:
    """The bank in another process: what its state is on disk, in a new one."""
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    fresh = Bank(capacity, WIDTH, batch)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(fresh.buffers(), bank.buffers(), strict=True))
    return fresh


@pytest.mark.parametrize("seed", range(60))
def test_it_is_a_queue_whatever_is_pushed_and_whenever_it_is_saved(seed: int) -> None:
    dice = random.Random(seed)
    batch = dice.randint(1, 9)
    capacity = dice.randint(batch, 30)
    bank, slow = Bank(capacity, WIDTH, batch), deque(maxlen=capacity)  # type: tuple[Bank, Slow]
    total = 0
    for step in range(dice.randint(1, 20)):
        rows, image_id, valid = draw(dice, dice.randint(1, batch))
        real = None if step % 4 == 3 else valid
        bank.push(rows, image_id, real)
        push(slow, rows, image_id, real)
        total += len(rows) if real is None else int(real.sum())
        assert inside(bank) == list(slow)
        assert (bank.filled, bank.pointer) == (min(total, capacity), total % capacity)
        assert bank.full == (len(slow) == capacity)
        if dice.random() < 0.3:
            bank = saved_and_loaded(bank, capacity, batch)
    assert bank.image_id[bank.filled :].eq(-1).all()


def test_a_push_over_the_end_goes_on_at_the_beginning() -> None:
    bank = Bank(5, 1, 4)
    for first in (0, 4, 8):
        bank.push(torch.arange(first, first + 4.0).unsqueeze(1), torch.arange(first, first + 4))
    assert bank.image_id.tolist() == [10, 11, 7, 8, 9]
    assert bank.rows[:, 0].tolist() == [10, 11, 7, 8, 9]
    assert bank.pointer == 2 and bank.full


def test_rows_that_are_not_real_are_not_pushed() -> None:
    bank = Bank(5, 1, 4)
    rows = torch.tensor([[1.0], [float("nan")], [3.0], [float("nan")]])
    for _ in range(3):
        bank.push(rows, torch.tensor([1, 2, 3, 4]), torch.tensor([True, False, True, False]))
    assert bank.image_id.tolist() == [3, 3, 1, 3, 1]
    assert bank.rows.isfinite().all()
    before = bank.rows.clone()
    bank.push(rows, torch.tensor([1, 2, 3, 4]), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(bank.rows, before) and bank.pointer == 1


def test_it_is_read_once_it_is_full_and_not_before() -> None:
    bank = Bank(6, WIDTH, 4)
    counts = []
    for step in range(4):
        counts.append(int(bank.read().filled))
        bank.push(torch.full((2, WIDTH), float(step)), torch.tensor([step, step]))
    assert counts == [0, 0, 0, 6]
    memory = bank.read()
    assert memory.rows[:, 0].tolist() == [3, 3, 1, 1, 2, 2]
    assert memory.image_id.tolist() == [3, 3, 1, 1, 2, 2]


def test_it_keeps_neither_a_graph_nor_the_tensors_it_was_given() -> None:
    bank = Bank(4, WIDTH, 2)
    rows = torch.ones(2, WIDTH, requires_grad=True)
    bank.push(rows * 2, torch.tensor([1, 2]))
    assert not bank.rows.requires_grad
    with torch.no_grad():
        rows.zero_()
    assert bank.rows[:2].eq(2).all()
    assert not list(bank.parameters())


def test_its_memory_is_what_it_says_from_the_first_step_on() -> None:
    bank = Bank(65536, 768, 512)
    assert bank.bytes == 65536 * (4 * 768 + 8) + 8 == 201_850_888
    assert bank.bytes == sum(b.untyped_storage().nbytes() for b in bank.buffers())


def test_pushing_before_the_backward_pass_is_noticed() -> None:
    bank = Bank(2, WIDTH, 2)
    bank.push(torch.ones(2, WIDTH), torch.tensor([1, 2]))
    student = torch.ones(2, WIDTH, requires_grad=True)
    loss = (student @ bank.read().rows.T).sum()
    bank.push(torch.ones(2, WIDTH), torch.tensor([3, 4]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_bank_smaller_than_the_batch_is_an_error() -> None:
    wanted = r"a bank of 63 rows is smaller than the batch of 64; expected at least one .*; give bank=64 or more, or"
    with pytest.raises(ValueError, match=wanted):
        Bank(63, WIDTH, 64)
    assert Bank(64, WIDTH, 64).capacity == 64


def test_a_bank_that_the_run_never_fills_is_an_error() -> None:
    wanted = (
        r"once it is full, and the run shows 256 pairs in batches of 64; expected .*; give bank=192 or less, bank=0"
    )
    with pytest.raises(ValueError, match=wanted):
        Bank(193, WIDTH, 64, pairs=256)
    with pytest.raises(ValueError, match=r"shows 100 pairs .*; give bank=0 for none, or train longer"):
        Bank(64, WIDTH, 64, pairs=100)
    bank = Bank(192, WIDTH, 64, pairs=256)  # read in the last of its four steps
    for _ in range(3):
        bank.push(torch.ones(64, WIDTH), torch.arange(64))
    assert bank.full


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, WIDTH + 1)])
def test_rows_that_do_not_fit_are_an_error(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"rows of shape \(.*\) do not fit a bank of shape \(4, 3\); .*; build"):
        Bank(4, WIDTH, 2).push(torch.ones(shape), torch.arange(shape[0]))


@pytest.mark.parametrize("size", [(8, WIDTH), (4, WIDTH + 1)])
def test_the_state_of_another_bank_is_an_error(size: tuple[int, int]) -> None:
    bank = Bank(4, WIDTH, 2)
    bank.push(torch.ones(2, WIDTH), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"the saved bank has shape \(.*\), this one \(4, 3\); .*; resume with"):
        bank.load_state_dict(Bank(*size, 2).state_dict())
    assert bank.filled == 2
