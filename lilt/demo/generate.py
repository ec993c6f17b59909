"""Write the demo set as an ordinary manifest: once per user, whole or not at all."""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from lilt.demo.captions import captions
from lilt.demo.ceiling import bag_of_words_ceiling
from lilt.demo.render import render
from lilt.demo.scenes import Scene, distinct, sample

VERSION = 2  # to be raised when the same parameters give other images or captions


def manifest(
    root: Path | None = None,
    *,
    train: int = 4000,
    val: int = 400,
    test: int = 400,
    captions_per_image: int = 5,
    seed: int = 0,
) -> Path:
    """The path of the set's manifest, generated on first use (about 10 s) and found again later.

    train, val and test count images. Without root the set lies in the user's cache folder. Its folder is written
    under a temporary name and renamed, so several processes may ask at the same time.
    Raises ValueError for a split without images.
    """
    sizes = {"train": train, "val": val, "test": test}
    if min(sizes.values()) < 1 or captions_per_image < 1:
        raise ValueError(
            f"got {sizes} images with {captions_per_image} captions each; every split needs at least one image with "
            "one caption: give positive numbers"
        )
    content = json.dumps([VERSION, sizes, captions_per_image, seed])
    name = f"demo-v{VERSION}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = (root or cache_folder()) / name
    if not (folder / "manifest.jsonl").is_file():
        _write(folder, sizes, captions_per_image, seed)
    return folder / "manifest.jsonl"


def cache_folder() -> Path:
    """lilt's folder for things that can be made again: under XDG_CACHE_HOME, else LOCALAPPDATA, else ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    return (Path(named) if named else Path.home() / ".cache") / "lilt"


def split_scenes(sizes: dict[str, int], seed: int) -> dict[str, list[Scene]]:
    """The scenes of each split; one generator per split, so that no size changes another split."""
    rngs = {split: random.Random(f"{seed} {split}") for split in sizes}
    return {
        "train": [sample(rngs["train"], held_out=False) for _ in range(sizes["train"])],
        "val": distinct(rngs["val"], sizes["val"], held_out=False),
        "test": distinct(rngs["test"], sizes["test"], held_out=True),
    }


def _write(folder: Path, sizes: dict[str, int], captions_per_image: int, seed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _fill(draft, sizes, captions_per_image, seed)
        draft.chmod(0o755)  # mkdtemp makes a folder that only its owner may enter
        try:
            draft.rename(folder)
        except OSError:
            # another process was first; what it wrote is the same, byte for byte
            if not (folder / "manifest.jsonl").is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(folder: Path, sizes: dict[str, int], captions_per_image: int, seed: int) -> None:
    (folder / "images").mkdir()
    lines: list[str] = []
    references: dict[str, dict[str, float]] = {}
    for split, scenes in split_scenes(sizes, seed).items():
        rng = random.Random(f"{seed} {split} captions")
        texts_of: list[list[str]] = []
        for scene in scenes:
            image = f"images/{len(lines):06d}.png"
            render(scene).save(folder / image, compress_level=1)
            texts = captions(scene, rng, captions_per_image)
            texts_of.append(texts)
            lines.append(json.dumps({"image": image, "captions": texts, "split": split}) + "\n")
        if split != "train":  # quadratic in the images, and nobody reports recall on what was trained on
            references[split] = {f"bag-of-words reader, {way}": value for way, value in _ceilings(texts_of).items()}
    with (folder / "references.json").open("w", encoding="utf-8", newline="\n") as file:
        json.dump(references, file, indent=1)
    with (folder / "manifest.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _ceilings(captions_of: list[list[str]]) -> dict[str, float]:
    ceiling = bag_of_words_ceiling(captions_of)
    return {"text→image R@1": ceiling["text_to_image"], "image→text R@1": ceiling["image_to_text"]}
