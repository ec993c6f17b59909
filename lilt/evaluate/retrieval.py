"""Retrieval recalls in both directions: chunked, several captions an image, ties counted against the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lilt.evaluate.late import Bags

RANKS = (1, 5, 10)
Items = Tensor | Bags
Score = Callable[[Any, Any], Tensor]  # some that ask (A) and all that answer (B) -> (A, B)


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return cosines in which equal rows tie exactly: summed in float64, where the order of summation is lost."""
    if ours.device.type == "mps":  # has no float64
        ours, theirs = ours.cpu(), theirs.cpu()
    return (ours.double() @ theirs.double().T).float().to(ours.device)


def retrieval(image: Items, text: Items, owner: Tensor, chunk: int = 512, score: Score = cosines) -> dict[str, Any]:
    """Return R@1/5/10 (percent) and median rank both ways, and their mean recall.

    image (N, D) and text (M, D) have unit rows, or are what score compares; owner (M,) says which image each text
    belongs to. An image is found when any of its captions is; a rank is 1 + the number of wrong answers that score at
    least as high as the best right one. Without ties these are the numbers of CLIP_benchmark; there the order of topk
    decides a tie (a caption that two images share, two equal pictures), here it counts against the model.
    Raises ValueError for an image without a caption.
    """
    counts = torch.bincount(owner, minlength=len(image))
    if len(image) == 0 or len(counts) != len(image) or int(counts.min()) == 0:
        raise ValueError(
            f"{len(image)} images and {len(text)} captions do not fit; each image needs at least one caption: "
            "leave out images that have none"
        )
    to_image = _summary(text_to_image_ranks(image, text, owner, chunk, score))
    to_text = _summary(image_to_text_ranks(image, text, owner, chunk, score))
    recalls = [side[f"R@{k}"] for side in (to_image, to_text) for k in RANKS]
    return {
        "text_to_image": to_image,
        "image_to_text": to_text,
        "mean_recall": sum(recalls) / len(recalls),
        "num_images": len(image),
        "num_captions": len(text),
    }


def text_to_image_ranks(image: Items, text: Items, owner: Tensor, chunk: int = 512, score: Score = cosines) -> Tensor:
    """Return the rank (M,) of each caption's own image among all images, best 1."""
    ranks = torch.empty_like(owner)  # made once: small results kept between large chunks would break up the memory
    for start in range(0, len(text), chunk):
        own = owner[start : start + chunk]
        scores = score(text[start : start + chunk], image)
        right = scores.gather(1, own.unsqueeze(1))
        # the right image itself is among those that do not score lower, which makes the rank start at 1; put this way
        # round, a score that is NaN counts against the model
        ranks[start : start + chunk] = (~(scores < right)).sum(1)
    return ranks


def image_to_text_ranks(image: Items, text: Items, owner: Tensor, chunk: int = 512, score: Score = cosines) -> Tensor:
    """Return the rank (N,) of each image's best own caption among all captions of others, best 1."""
    ranks = torch.empty(len(image), dtype=torch.long, device=image.device)
    for start in range(0, len(image), chunk):
        scores = score(image[start : start + chunk], text)
        mine = owner.unsqueeze(0) == torch.arange(start, start + len(scores), device=owner.device).unsqueeze(1)
        best = scores.masked_fill(~mine, float("-inf")).amax(1, keepdim=True)
        ranks[start : start + chunk] = 1 + (~(scores < best) & ~mine).sum(1)
    return ranks


def _summary(ranks: Tensor) -> dict[str, float]:
    recalls = {f"R@{k}": 100.0 * float((ranks <= k).double().mean()) for k in RANKS}
    # the lower of the two middle ranks would flatter an even count; take their mean as everybody does
    return {**recalls, "median_rank": float(torch.quantile(ranks.double(), 0.5))}
