"""Winoground: two images, two captions of the same words in another order, and which belongs to which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lilt.data.manifest import read_records
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import OnData, Values, register

FIELDS = ("image_0", "image_1", "caption_0", "caption_1")


class Group(NamedTuple):
    """Two images, and the caption of each."""

    images: tuple[str, str]
    captions: tuple[str, str]


@register("winoground")
@dataclass(frozen=True)
class Winoground(OnData):
    """Match two images with two captions of the same words; records have image_0, image_1, caption_0 and caption_1.

    text: each image prefers its own caption (chance 25 %); image: each caption prefers its own image (25 %); group:
    both (16.7 %). A tie is not preferred. A group with an image that cannot be read is left out and counted.
    Source: Thrush et al. 2022, arXiv 2204.03162.
    """

    def measure(self, subject: Subject) -> Values:
        source, given = self.source(subject)
        root = Path(given) if given else source.parent
        groups = [_group(where, record, root) for where, record in read_records(source)]
        self.check_count(len(groups), f"groups in {source}")
        paths = sorted({path for group in groups for path in group.images})
        seen = subject.see("winoground", paths, lambda images, _: subject.core.encode_image(images))
        texts = sorted({caption for group in groups for caption in group.captions})
        rows, cut = subject.read("winoground: captions", texts, subject.core.encode_text)
        place = {paths[i]: at for at, i in enumerate(seen.which.tolist())}
        whole = [group for group in groups if all(path in place for path in group.images)]
        if not whole:
            raise ValueError(
                f"winoground: no group of {source} has two readable images (of {len(groups)}); expected image files; "
                "check image_root"
            )
        number = {text: at for at, text in enumerate(texts)}
        image = seen.rows[torch.tensor([[place[p] for p in group.images] for group in whole])]
        text = rows[torch.tensor([[number[c] for c in group.captions] for group in whole])]
        yield from ((name, 100 * float(right.double().mean())) for name, right in winoground(image, text).items())
        yield "num_groups", len(whole)
        yield "num_unreadable", len(groups) - len(whole)
        yield "num_cut_captions", cut
        self.check_count(len(whole), "groups with two readable images")


def winoground(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Return which groups (G,) are right by each score, of unit rows of images and their captions (G, 2, D)."""
    scores = image.double() @ text.double().transpose(1, 2)  # (G, image, text)
    own = scores.diagonal(dim1=1, dim2=2)
    by_text = (own > torch.stack([scores[:, 0, 1], scores[:, 1, 0]], 1)).all(1)
    by_image = (own > torch.stack([scores[:, 1, 0], scores[:, 0, 1]], 1)).all(1)
    return {"text": by_text, "image": by_image, "group": by_text & by_image}


def _group(where: str, record: Any, root: Path) -> Group:
    if not isinstance(record, Mapping) or not all(isinstance(record.get(k), str) and record[k].strip() for k in FIELDS):
        has = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(f"{where}: expected texts under {', '.join(FIELDS)}; it has {has}; mend the line")
    images = [root / record[key] for key in FIELDS[:2]]
    # the published set names its images without their ending
    named = [path.with_name(f"{path.name}.png") if not path.suffix else path for path in images]
    return Group((str(named[0]), str(named[1])), (record[FIELDS[2]], record[FIELDS[3]]))
