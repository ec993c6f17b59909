"""Stored rows: read back as written, of fixed and of varying length, shared, resumed, and honest about what is bad."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from lilt.data import Store
from lilt.data.store import shared_free

LENGTHS = torch.tensor([3, 1, 4, 2])
where = pytest.mark.parametrize("place", ["memory", "disk"])


def folder(place: str, tmp_path: Path) -> Path | None:
    return tmp_path / "rows" if place == "disk" else None


@where
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_rows_come_back(place: str, dtype: str, tmp_path: Path) -> None:
    store = Store(folder(place, tmp_path), 5, (2, 3), dtype)
    rows = torch.randn(3, 2, 3)
    store.put(torch.tensor([4, 0, 2]), rows)
    assert store.missing().tolist() == [1, 3]
    back = store.get(torch.tensor([2, 4, 4]))
    assert back.dtype == torch.float32
    tolerance = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11}[dtype]
    torch.testing.assert_close(back, rows[[2, 0, 0]], rtol=tolerance, atol=1e-6 if tolerance else 0)


@where
def test_items_of_several_lengths_are_padded_with_zeros(place: str, tmp_path: Path) -> None:
    store = Store(folder(place, tmp_path), 4, (2,), lengths=LENGTHS)
    padded = torch.randn(4, 4, 2)  # what a tower gives on padding is of no use
    store.put(torch.tensor([1, 3, 0, 2]), padded)
    back = store.get(torch.tensor([0, 1, 3]))
    assert back.shape == (3, 3, 2)
    assert torch.equal(back[0], padded[2, :3])
    assert torch.equal(back[1, :1], padded[0, :1]) and not back[1, 1:].any()
    assert torch.equal(back[2, :2], padded[1, :2]) and not back[2, 2:].any()
    assert Store.size(4, (2,), "fp16", LENGTHS) == 10 * 2 * 2
    assert store.rows.nbytes == 10 * 2 * 4


@where
def test_unknown_items_are_zeros(place: str, tmp_path: Path) -> None:
    store = Store(folder(place, tmp_path), 3, (2,))
    store.put(torch.tensor([0, 1]), torch.ones(2, 2))
    items = torch.tensor([0, 2])
    assert store.good(items).tolist() == [True, False]
    assert store.get(items).tolist() == [[1, 1], [0, 0]]
    assert store.missing().tolist() == [2]


@where
def test_a_copy_sees_what_the_other_writes(place: str, tmp_path: Path) -> None:
    store = Store(folder(place, tmp_path), 3, (2,))
    if place == "disk":  # another process, and one that comes later
        other, later = pickle.loads(pickle.dumps(store)), Store(folder(place, tmp_path), 3, (2,))
        assert len(pickle.dumps(store)) < 2000
    else:  # as a data worker receives it
        assert store.rows.is_shared() and store.known.is_shared()
        other = later = store
    store.put(torch.tensor([1]), torch.full((1, 2), 7.0))
    for copy in (other, later):
        assert copy.missing().tolist() == [0, 2]
        assert copy.get(torch.tensor([1])).tolist() == [[7, 7]]


def test_without_workers_nothing_is_shared() -> None:
    store = Store(None, 3, (2,), shared=False)
    assert not store.rows.is_shared() and not store.known.is_shared()
    store.put(torch.tensor([1]), torch.ones(1, 2))
    assert store.get(torch.tensor([1, 0])).tolist() == [[1, 1], [0, 0]]


def test_too_little_shared_memory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    monkeypatch.setattr("lilt.data.store.SHARED", tmp_path)
    message = (
        r"need 0\.50 GiB of shared memory, and [\d.]+ GiB are free in .*No space left.*; expected place for them; "
        r"start the container with a larger --shm-size, or use --reuse disk or off, or --workers 0"
    )
    with pytest.raises(ValueError, match=message):
        Store(None, 2**17, (2**10,))
    assert shared_free() == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    monkeypatch.setattr("lilt.data.store.SHARED", tmp_path / "nowhere")
    assert shared_free() is None
    with pytest.raises(ValueError, match=r"of shared memory \(unable to allocate"):
        Store(None, 2, (2,))
    Store(None, 2, (2,), shared=False)


def test_rows_are_given_as_they_were_made() -> None:
    store = Store(None, 2, (2,), "fp16", gives=torch.bfloat16)
    store.put(torch.tensor([0]), torch.ones(1, 2, dtype=torch.bfloat16))
    assert store.get(torch.tensor([0])).dtype == torch.bfloat16
