"""The features of each layer: one forward, every family of towers, what `layers=` would keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilt.advise.layers import OUTPUT, Reader
from lilt.towers import Tower, build_tower
from tests.conftest import CAPTIONS
from tests.towers.families import FAMILIES, batch, tiny


def read(tower: Tower, inputs: Any, every: bool = True) -> dict[str, Tensor]:
    reader = Reader(tower.eval(), every)
    with torch.no_grad():
        return reader.split(reader.read(inputs))


def one(inputs: Any, i: int) -> Any:
    """Item i alone, without the padding that the others made necessary."""
    if isinstance(inputs, Tensor):
        return inputs[i : i + 1]
    long = int(inputs["attention_mask"][i].sum()) if bool(inputs["attention_mask"].min() == 0) else None
    fixed = inputs["input_ids"].shape[1] == 16  # open_clip's always have their whole context
    return {key: value[i : i + 1, : None if fixed else long] for key, value in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_that_of_its_item_alone(family: str) -> None:
    tower = tiny(family)
    inputs = batch(tower)
    found = read(tower, inputs)
    assert len(found) == max(1, len(tower.blocks)) and list(found)[-1] == OUTPUT
    for name, rows in found.items():
        assert rows.ndim == 2 and len(rows) == 3 and rows.isfinite().all(), name
        assert not torch.allclose(rows[0], rows[1]), name
    for i in range(3):
        alone = read(tower, one(inputs, i))
        for name, rows in found.items():
            torch.testing.assert_close(alone[name][0], rows[i], rtol=1e-3, atol=1e-4, msg=f"{name} of item {i}")


def test_the_output_is_what_heads_read_and_can_be_had_alone() -> None:
    tower = tiny("vit")
    inputs = batch(tower)
    with torch.no_grad():
        plain = tower(inputs)
    last = read(tower, inputs, every=False)
    assert list(last) == [OUTPUT]
    torch.testing.assert_close(last[OUTPUT], plain)
    torch.testing.assert_close(read(tower, inputs)[OUTPUT], plain)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_text_block_is_what_fewer_layers_give(tiny_text: str, pool: str) -> None:
    whole = build_tower(f"{tiny_text}?pool={pool}", "text").eval()
    cut = build_tower(f"{tiny_text}?pool={pool}&layers=1", "text").eval()
    inputs = whole.contract.pad(whole.contract.encode([c.format("red") for c in CAPTIONS])[0])  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(read(whole, inputs)["1 of 2"], cut(inputs))


def test_a_vision_block_is_that_before_the_last_norm(tiny_vision: str) -> None:
    whole = build_tower(f"{tiny_vision}?pool=cls", "vision").eval()
    cut = build_tower(f"{tiny_vision}?pool=cls&layers=1", "vision").eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(cut.body.norm(read(whole, images)["1 of 2"]), cut(images))


def test_both_means_stand_side_by_side_where_the_tower_pools_so(tiny_vision: str, pictures: Path) -> None:
    tower = build_tower(f"{tiny_vision}?pool=cls%2Bmean", "vision")
    widths = {name: rows.shape[1] for name, rows in read(tower, torch.randn(2, 3, 32, 32)).items()}
    assert widths == {"1 of 2": 64, OUTPUT: 64}
