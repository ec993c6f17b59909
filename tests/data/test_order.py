"""The order of training: every unit once an epoch, near a few shards, the same for any ranks and from any step."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest

from lilt.data import Batches, Order
from lilt.data.order import Key, draw_seed

GROUPS = [7, 5, 0, 9, 12, 3, 8, 6]  # 50 units in shards of all sizes, one of them empty
ORDERS: dict[str, dict[str, Any]] = {
    "manifest": {"groups": [50]},
    "one window": {"groups": GROUPS, "window": 64},
    "windows": {"groups": GROUPS, "window": 11},
    "windows of one": {"groups": GROUPS, "window": 1},
    "resampled": {"groups": GROUPS, "window": 11, "resample": True},
    "resampled manifest": {"groups": [50], "resample": True},
}
EXACT = [name for name in ORDERS if "resampled" not in name]


def order(name: str, seed: int = 4) -> Order:
    return Order(**ORDERS[name], seed=seed)


def steps(name: str, count: int, **options: Any) -> list[list[Key]]:
    return list(islice(Batches(order(name), 12, **options), count))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ORDERS)
def test_ranks_share_each_batch_in_order(name: str, world: int) -> None:
    whole = steps(name, 9)
    parts = [steps(name, 9, rank=rank, world=world) for rank in range(world)]
    assert [[key for rank in range(world) for key in parts[rank][step]] for step in range(9)] == whole


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 8, 23])
@pytest.mark.parametrize("name", ORDERS)
def test_a_start_anywhere_is_the_tail_of_the_whole(name: str, start: int) -> None:
    assert steps(name, 3, start=start) == steps(name, 26)[start : start + 3]


@pytest.mark.parametrize("name", ORDERS)
def test_places_are_the_same_in_whatever_pieces_they_are_asked_for(name: str) -> None:
    whole = order(name).keys(2, 0, 50)
    assert len(whole) == 50
    other = order(name)
    backwards = [other.keys(2, at, min(at + 7, 50)) for at in reversed(range(0, 50, 7))]
    assert [key for part in reversed(backwards) for key in part] == whole


@pytest.mark.parametrize("name", EXACT)
def test_an_epoch_shows_each_unit_once(name: str) -> None:
    found = [order(name).keys(epoch, 0, 50) for epoch in range(3)]
    for epoch, keys in enumerate(found):
        assert sorted(keys) == [(epoch, unit) for unit in range(50)]
    assert len({tuple(unit for _, unit in keys) for keys in found}) == 3


def test_batches_go_on_into_the_next_epoch_and_drop_the_rest() -> None:
    assert Batches(order("windows"), 12).steps_per_epoch == 4
    keys = steps("windows", 8)
    first, second = ([key for step in keys[i : i + 4] for key in step] for i in (0, 4))
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    assert len({unit for _, unit in first}) == 48


def test_another_seed_is_another_order() -> None:
    assert order("windows", seed=4).keys(0, 0, 50) != order("windows", seed=5).keys(0, 0, 50)


def test_shards_in_one_window_come_in_the_order_of_a_manifest() -> None:
    assert order("one window").keys(3, 0, 50) == order("manifest").keys(3, 0, 50)


def test_a_window_stays_near_a_few_shards() -> None:
    sizes = [10] * 100
    keys = Order(sizes, seed=1, window=40).keys(0, 0, 1000)
    windows = [{unit // 10 for _, unit in keys[at : at + 40]} for at in range(0, 1000, 40)]
    assert all(len(shards) == 4 for shards in windows)
    # the shards are drawn from all over, and their units do not stay in order
    assert sum(max(shards) - min(shards) > 20 for shards in windows) > 20
    assert [unit for _, unit in keys[:40]] != sorted(unit for _, unit in keys[:40])


@pytest.mark.parametrize("groups", [[50], [5] * 10])
@pytest.mark.parametrize("window", [None, 11])
def test_every_unit_comes_first_equally_often(groups: list[int], window: int | None) -> None:
    one = Order(groups, seed=3, window=window)
    draws = 2000
    counts = Counter(one.keys(epoch, 0, 1)[0][1] for epoch in range(draws))
    chi2 = sum((counts[unit] - draws / 50) ** 2 / (draws / 50) for unit in range(50))
    assert chi2 < 85.4  # exceeded by chance once in a thousand seeds; 49 degrees of freedom


def test_resampling_draws_whole_shards_alike_with_replacement() -> None:
    one = Order([10] * 20, seed=2, window=50, resample=True)
    times: Counter[int] = Counter()
    for epoch in range(300):
        drawn = Counter(unit // 10 for _, unit in one.keys(epoch, 0, 200))
        assert all(count % 10 == 0 for count in drawn.values())
        times.update({shard: count // 10 for shard, count in drawn.items()})
    chi2 = sum((times[shard] - 300) ** 2 / 300 for shard in range(20))
    assert 5 < chi2 < 43.8  # 19 degrees of freedom; without replacement it would be 0


def test_a_resampled_epoch_is_as_long_as_an_exact_one_with_shards_of_unequal_sizes() -> None:
    one = Order([1, 0, 1, 1, 200], seed=2, window=50, resample=True)
    for epoch in range(50):
        assert len(one.keys(epoch, 0, 203)) == 203
    assert Batches(one, 10).steps_per_epoch == 20


def test_a_resampled_manifest_draws_single_images() -> None:
    keys = Order([10_000], seed=1, resample=True).keys(0, 0, 10_000)
    assert 0.62 < len({unit for _, unit in keys}) / 10_000 < 0.645  # 1 - 1/e


@pytest.mark.parametrize("name", ["resampled", "resampled manifest"])
def test_what_is_drawn_twice_is_augmented_in_two_ways(name: str) -> None:
    keys = [key for epoch in range(3) for key in order(name).keys(epoch, 0, 50)]
    assert len({unit for _, unit in keys}) < len(keys)
    assert len(set(keys)) == len(keys)


def test_neighbouring_draws_share_no_seed() -> None:
    seeds = {draw_seed(s, epoch, index) for s in range(3) for epoch in range(30) for index in range(300)}
    assert len(seeds) == 3 * 30 * 300


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    sampler = Batches(Order([5]), 128)
    assert sampler.steps_per_epoch == 1
    assert sorted(next(iter(sampler))) == [(0, i) for i in range(5)]
    pair = [next(iter(Batches(Order([5]), 128, rank=rank, world=2))) for rank in range(2)]
    assert [len(p) for p in pair] == [2, 2]


def test_a_buffer_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="shuffle_buffer=0; expected more than 0; give a few batches"):
        Order([3], window=0)


def test_fewer_pairs_than_processes_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size=128 on 3 pairs leaves no pair for each of 4 processes; use fewer"):
        Batches(Order([3]), 128, world=4)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("piece", [1, 4, 5, 6, 100])
def test_a_batch_in_pieces_is_the_same_batch(piece: int, world: int) -> None:
    for rank in range(world):
        options: dict[str, Any] = {"rank": rank, "world": world, "start": 3}
        whole = Batches(order("windows"), 12, **options)
        split = Batches(order("windows"), 12, piece=piece, **options)
        pieces = iter(split)
        for batch in islice(whole, 5):
            parts = [next(pieces) for _ in range(split.pieces)]
            assert [key for part in parts for key in part] == batch
            assert {len(part) for part in parts[:-1]} <= {piece} and 0 < len(parts[-1]) <= piece
