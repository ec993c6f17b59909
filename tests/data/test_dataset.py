"""Pairs are drawn by their key alone, whatever the number of workers."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lilt.data import (
    Batch,
    Batches,
    Collate,
    Order,
    PairDataset,
    Sample,
    TokenTable,
    read_manifest,
    select,
    train_transform,
)
from lilt.towers import ImageContract
from lilt.towers.tokenizer import HfTokenizer

CONTRACT = ImageContract(16)
AUGMENT = "crop(0.3,1)+hflip+randaugment+jitter"


@pytest.fixture(scope="module")
def tokenizer(tiny_text: str) -> HfTokenizer:
    return HfTokenizer(AutoTokenizer.from_pretrained(tiny_text.removeprefix("hf:")), 16)


@pytest.fixture(scope="module")
def samples(pictures: Path) -> list[Sample]:
    return select(read_manifest(pictures / "manifest.jsonl"), "train")


@pytest.fixture
def pairs(samples: list[Sample], tokenizer: HfTokenizer) -> PairDataset:
    return PairDataset(samples, tokenizer, train_transform(CONTRACT, AUGMENT), seed=3)


def load(dataset: PairDataset, tokenizer: HfTokenizer, steps: int, **options: Any) -> list[Batch]:
    sampler = Batches(Order([len(dataset)], seed=1), 4)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=Collate(tokenizer, (3, 16, 16)), **options)
    return list(islice(loader, steps))


def equal(one: Batch, other: Batch) -> bool:
    names = ("images", "image_id", "text_id", "valid")
    tokens = all(torch.equal(one.tokens[k], other.tokens[k]) for k in one.tokens | other.tokens)
    return tokens and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize(
    "options", [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}], ids=str
)
def test_workers_change_nothing(pairs: PairDataset, tokenizer: HfTokenizer, options: dict[str, Any]) -> None:
    torch.manual_seed(9)
    here = load(pairs, tokenizer, 5)
    torch.manual_seed(10)  # nor does what else uses the global generator
    there = load(pairs, tokenizer, 5, **options)
    assert all(equal(one, other) for one, other in zip(here, there, strict=True))
    assert not torch.equal(here[0].images, here[3].images)


def test_drawing_leaves_the_global_generator_alone(pairs: PairDataset) -> None:
    before = torch.random.get_rng_state()
    pairs[0, 3]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_each_epoch_augments_and_chooses_anew(pairs: PairDataset) -> None:
    images = [pairs[epoch, 0].image for epoch in range(4)]
    assert len({str(i.flatten()[:50].tolist()) for i in images if i is not None}) == 4
    assert len({pairs[epoch, 0].text_id for epoch in range(12)}) == 3


def test_captions_are_drawn_uniformly(samples: list[Sample], tokenizer: HfTokenizer) -> None:
    dataset = PairDataset(samples[:1], tokenizer, lambda picture: torch.zeros(3, 2, 2), seed=5)
    draws = 900
    counts = Counter(dataset[epoch, 0].text_id for epoch in range(draws))
    assert len(counts) == 3
    chi2 = sum((n - draws / 3) ** 2 / (draws / 3) for n in counts.values())
    assert chi2 < 13.8  # exceeded by chance once in a thousand seeds; 2 degrees of freedom


def test_all_captions_make_a_pair_each(samples: list[Sample], tokenizer: HfTokenizer) -> None:
    dataset = PairDataset(samples, tokenizer, train_transform(CONTRACT, "none"), captions="all")
    assert len(dataset) == 36
    drawn = [dataset[0, i] for i in range(36)]
    assert [p.image_id for p in drawn] == [i for i in range(12) for _ in range(3)]
    assert isinstance(drawn[4].tokens, dict)
    words = HfTokenizer.pad(tokenizer, [drawn[4].tokens])["input_ids"][0].tolist()
    assert tokenizer.tokenizer.decode(words, skip_special_tokens=True) == samples[1].captions[1]


def test_another_way_with_captions_is_an_error(samples: list[Sample], tokenizer: HfTokenizer) -> None:
    with pytest.raises(ValueError, match=r"captions='two'; expected 'one' .* or 'all'; choose one"):
        PairDataset(samples, tokenizer, train_transform(CONTRACT, "none"), captions="two")


def test_cut_captions_are_counted_once_each(tokenizer: HfTokenizer) -> None:
    texts = ("red " * 30, "a red boat", "blue " * 15, "a b c d e f g h i j k l m n")
    dataset = PairDataset([Sample(Path("x"), texts, "train")] * 2, tokenizer, train_transform(CONTRACT, "none"))
    assert dataset.table.cut == 2  # 14 words and two specials fit exactly
    assert max(len(dataset.table[i]["input_ids"]) for i in range(4)) == 16
    short = PairDataset([Sample(Path("x"), texts, "train")], tokenizer, dataset.transform, max_tokens=5)
    assert short.table.cut == 3
    assert [len(short.table[i]["input_ids"]) for i in range(4)] == [5, 5, 5, 5]


def test_captions_encoded_in_parts_are_those_encoded_at_once(
    tokenizer: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["red " * n for n in range(1, 24)]
    whole = TokenTable(texts, tokenizer)
    monkeypatch.setattr("lilt.data.dataset.TEXTS", 5)
    parts = TokenTable(texts, tokenizer)
    assert whole.cut == parts.cut == 9  # the longer ones than 14 words
    assert [whole[i] for i in range(23)] == [parts[i] for i in range(23)]
