"""Where stored rows lie: a folder named by all that they were computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lilt.data import PairDataset
from lilt.data.hub import is_row, row_stamp
from lilt.data.stamp import file_stamp
from lilt.demo.generate import cache_folder
from lilt.towers import ImageContract, Tokenizer

VERSIONS = ("lilt", "torch", "torchvision", "pillow", "timm", "transformers", "tokenizers", "open_clip_torch")


def folder_of(facts: Mapping[str, Any]) -> Path:
    """Return the folder, in lilt's cache, of rows with these facts; other facts or other libraries have another."""
    told = json.dumps({**facts, "versions": [version(name) for name in VERSIONS]}, sort_keys=True)
    return cache_folder() / "reuse" / hashlib.sha256(told.encode()).hexdigest()[:32]


def image_facts(pairs: PairDataset, contract: ImageContract, augment: str) -> dict[str, Any] | None:
    """Return what the pixels of all views depend on; None where nothing tells: a preprocess of one's own.

    A file counts as the same while its path, size and time of change are; a row of a dataset, while its files are.
    """
    if contract.transform is not None:
        return None
    stamps = [row_stamp(path) if is_row(path) else file_stamp(path) for path in pairs.paths]
    if None in stamps:
        return None
    seed = None if augment == "none" else pairs.seed
    return {
        "contract": asdict(contract),
        "augment": augment,
        "views": pairs.views,
        "seed": seed,
        "files": _digest(f"{path} {stamp}" for path, stamp in zip(pairs.paths, stamps, strict=True)),
    }


def caption_facts(pairs: PairDataset, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the tokens of all captions depend on."""
    flat = pairs.table.flat
    tokens = {name: hashlib.sha256(values.numpy().tobytes()).hexdigest() for name, values in flat.items()}
    return {"tokens": tokens, "lengths": _digest(pairs.table.offsets.tolist()), "tokenizer": tokenizer.describe()}


def _digest(items: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item}\n".encode())
    return digest.hexdigest()
