"""A split is embedded with one forward for each image and each distinct caption; what cannot be read is counted."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from lilt import DualEncoder, ImageContract, ModelConfig
from lilt.data import Sample, read_manifest, select
from lilt.evaluate import embed_split, evaluate_retrieval
from lilt.model import TwoTower


@pytest.fixture(scope="module")
def model(tiny_vision: str, tiny_text: str) -> TwoTower:
    return DualEncoder.build(tiny_vision, tiny_text, projection="linear(dim=16)").core


@pytest.fixture(scope="module")
def samples(pictures: Path) -> list[Sample]:
    """12 images with 3 captions each, every caption on two images."""
    return select(read_manifest(pictures / "manifest.jsonl"), "train")


class Counter:
    """Counts the rows that a tower sees."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.rows = 0
        self.modes: set[bool] = set()
        tower.register_forward_pre_hook(self)

    def __call__(self, tower: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0]["input_ids"] if isinstance(args[0], dict) else args[0]
        self.rows += len(inputs)
        self.modes.add(tower.training)


@pytest.mark.parametrize("batch_size", [1, 5, 128])
def test_each_image_and_each_distinct_caption_is_encoded_once(
    tiny_vision: str, tiny_text: str, samples: list[Sample], batch_size: int
) -> None:
    model = DualEncoder.build(tiny_vision, tiny_text).core.train()
    seen, read = Counter(model.vision), Counter(model.text)
    embedded = embed_split(model, samples, batch_size=batch_size)
    assert (seen.rows, read.rows) == (12, 18)
    assert (len(embedded.image), len(embedded.text)) == (12, 36)
    assert seen.modes == read.modes == {False}
    assert model.training
    assert model.text.training


def test_the_mode_is_restored_after_an_error(model: TwoTower, samples: list[Sample]) -> None:
    model.train()
    with pytest.raises(RuntimeError, match="stop here"):
        embed_split(model, samples, advance=stop)
    assert model.training
    model.eval()
    embed_split(model, samples)
    assert not model.training


def stop(count: int) -> None:
    raise RuntimeError("stop here")


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"batch_size": 128}, {"workers": 2, "batch_size": 4}], ids=str)
def test_rows_are_those_of_the_facade_in_the_order_of_the_samples(
    model: TwoTower, samples: list[Sample], options: dict[str, Any]
) -> None:
    embedded = embed_split(model, samples, **options)
    facade = DualEncoder(model, ModelConfig())
    texts = [c for s in samples for c in s.captions]
    alone = facade.embed(images=[s.image for s in samples], texts=texts, batch_size=1)
    torch.testing.assert_close(embedded.image, alone["image"], rtol=0, atol=1e-5)
    torch.testing.assert_close(embedded.text, alone["text"], rtol=0, atol=1e-5)
    assert embedded.owner.tolist() == [i for i in range(12) for _ in range(3)]


def test_progress_counts_every_image(model: TwoTower, samples: list[Sample]) -> None:
    moves: list[int] = []
    embed_split(model, samples, batch_size=5, advance=moves.append)
    assert moves == [5, 5, 2]


def test_an_unreadable_image_leaves_with_its_captions_and_is_counted(
    model: TwoTower, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    bad = Sample(tmp_path / "bad.png", ("a red boat", "paint"), "train")
    mixed = [*samples[:3], bad, *samples[3:]]
    embedded = embed_split(model, mixed, batch_size=2)
    assert [path for path, _ in embedded.faults] == [str(tmp_path / "bad.png")]
    result, clean = evaluate_retrieval(model, mixed), evaluate_retrieval(model, samples)
    assert (result.pop("num_unreadable"), clean.pop("num_unreadable")) == (1, 0)
    assert result == clean
    assert (result["num_images"], result["num_captions"]) == (12, 36)


def test_cut_captions_are_counted(model: TwoTower, samples: list[Sample]) -> None:
    assert evaluate_retrieval(model, samples)["num_cut_captions"] == 0
    assert evaluate_retrieval(model, samples, max_tokens=6)["num_cut_captions"] == 6  # all of it is {colour}


def test_a_split_without_one_readable_image_is_an_error(model: TwoTower, tmp_path: Path) -> None:
    gone = [Sample(tmp_path / f"{i}.png", ("a boat",), "test") for i in range(3)]
    with pytest.raises(ValueError, match=r"none of the 3 images could be read \(first: .*0.png.*check --image_root"):
        evaluate_retrieval(model, gone)


def test_data_workers_leave_ctrl_c_to_the_main_process(model: TwoTower, samples: list[Sample]) -> None:
    def transform(picture: Image.Image) -> torch.Tensor:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.full((3, 32, 32), float(picture.width))

    vision = copy.copy(model.vision)
    vision.contract = ImageContract(32, transform=transform)
    other = TwoTower(vision, model.text, model.projection, model.scale)
    embedded = embed_split(other, samples, workers=1, batch_size=4)
    assert torch.equal(embedded.image, embed_split(other, samples, batch_size=4).image)
