"""Several runs side by side: what each trained, found and took, and in what they cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lilt.report.past import SIDES, Past, read_past

SPLITS = ("test", "val")


@dataclass(frozen=True)
class Row:
    """One run: recalls in percent on the split that is compared; what it did not note down is None.

    differs names what makes it another experiment than the first run that was named.
    """

    run: str
    policy: str
    trained: int
    total: int
    percent: float
    mean_recall_before: float | None
    mean_recall: float | None
    text_to_image_r1: float | None
    image_to_text_r1: float | None
    seconds: float | None
    peak_bytes: int | None
    adapter_bytes: int
    num_images: int | None
    finished: bool
    differs: tuple[str, ...]


def compare_runs(runs: Sequence[str], split: str = "test") -> list[Row]:
    """Read runs and return a row for each, the fewest trained values first.

    Nothing is evaluated: the numbers are those of the folders. Raises ValueError for what is no run, and for a split
    that runs note nothing of.
    """
    if split not in SPLITS:
        raise ValueError(
            f"split={split}: runs note recalls of their test and their validation split; expected test or val; choose "
            "one, or measure others with lilt evaluate"
        )
    pasts = [read_past(run) for run in runs]
    first = circumstances(pasts[0], split)
    rows = []
    for run, past in zip(runs, pasts, strict=True):
        own = circumstances(past, split)
        known = [name for name in first if first[name] is not None and own[name] is not None]
        rows.append(_row(run, past, split, tuple(name for name in known if own[name] != first[name])))
    return sorted(rows, key=lambda row: (row.trained, row.run))


def circumstances(past: Past, split: str) -> dict[str, Any]:
    """Return what two runs must have in common for their numbers to be compared; None is not known yet."""
    settings, towers, result = past.settings, past.contract["towers"], past.result(split) or {}
    learned = [settings.get(key) for key in ("data", "train_split", "max_images")]
    asked = [settings.get("val_data") or settings.get("data"), past.split(split)]
    counts = [result[key] for key in ("num_images", "num_captions")] if result else None
    # the same weights may lie at another place: the spec may differ, the fingerprint may not
    known = {side: {key: value for key, value in towers[side].items() if key != "spec"} for side in towers}
    return {
        "training data": learned,
        f"{split} split": asked,
        "counted images": counts,
        "vision tower": known["vision"],
        "text tower": known["text"],
    }


def _row(run: str, past: Past, split: str, differs: tuple[str, ...]) -> Row:
    contract, end = past.contract, past.end or {}
    result = past.result(split)
    before = past.before if split == "test" else None
    to_image, to_text = (None if result is None else result[side]["R@1"] for side in SIDES)
    return Row(
        run=run,
        policy=past.policy,
        trained=contract["trained"],
        total=contract["total"],
        percent=100 * contract["trained"] / contract["total"],
        mean_recall_before=None if before is None else before["mean_recall"],
        mean_recall=None if result is None else result["mean_recall"],
        text_to_image_r1=to_image,
        image_to_text_r1=to_text,
        seconds=end.get("seconds"),
        peak_bytes=end.get("peak_bytes"),
        adapter_bytes=past.adapter_bytes,
        num_images=None if result is None else int(result["num_images"]),
        finished=past.end is not None,
        differs=differs,
    )
