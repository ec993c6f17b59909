"""Several runs side by side: what each trained, found and took, and in what they cannot be compared."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lilt import checkpoint
from lilt.report.conserved import Measured, named, read_tasks
from lilt.report.findings import Kept
from lilt.report.past import SIDES, Past, read_past

SPLITS = ("test", "val")
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Row:
    """One run, or a model as it is: recalls in percent on the split that is compared; what is not known is None.

    differs names what makes it another experiment than the first run that was named; measure is the command that finds
    the recalls of a model that was merged or saved and never measured. conserved is what files of tasks say of it.
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
    measure: str | None = None
    conserved: tuple[Kept, ...] = ()


def compare_runs(runs: Sequence[str], split: str = "test") -> list[Row]:
    """Read runs, or what `lilt evaluate --json` printed, and return a row for each, the fewest trained values first.

    A file of tasks belongs to the row of its run, which need not be named too. Nothing is evaluated: the numbers are
    those of the folders and files. Raises ValueError for what is neither, and for a split that runs note nothing of.
    """
    if split not in SPLITS:
        raise ValueError(
            f"split={split}: runs note recalls of their test and their validation split; expected test or val; choose "
            "one, or measure others with lilt evaluate"
        )
    folders, told = _told(runs)
    found = [_read_result(run, split) if Path(run).is_file() else _read_run(run, split) for run in folders]
    first = found[0][1]
    rows = []
    for row, own in found:
        known = [name for name in first if first[name] is not None and own.get(name) is not None]
        differs = tuple(name for name in known if own[name] != first[name])
        rows.append(replace(row, differs=differs, conserved=told.get(row.run, ())))
    return sorted(rows, key=lambda row: (row.trained, row.run))


def _told(runs: Sequence[str]) -> tuple[list[str], dict[str, tuple[Kept, ...]]]:
    """Return the runs, those of files of tasks in their place, and what these files say of each."""
    folders: list[str] = []
    told: dict[str, Measured] = {}
    for run in runs:
        tasks = read_tasks(run) if Path(run).is_file() else None
        if tasks is not None and not (Path(tasks.run) / checkpoint.CONTRACT).is_file():
            raise ValueError(
                f"{run} says what was kept of {tasks.run}, which is no folder of a checkpoint here; expected one; "
                "compare from the folder that it was evaluated from"
            )
        name = run if tasks is None else tasks.run
        # a run that is named with and without a / at its end is one
        same = next((other for other in folders if Path(other).absolute() == Path(name).absolute()), name)
        if same not in folders:
            folders.append(same)
        if tasks is not None:
            told.setdefault(same, []).extend(tasks.measured)
    return folders, dict(zip(told, named(list(told.values())), strict=True))


def circumstances(past: Past, split: str) -> dict[str, Any]:
    """Return what two runs must have in common for their numbers to be compared; None is not known yet."""
    settings, towers, result = past.settings, past.contract["towers"], past.result(split) or {}
    learned = [_place(settings.get("data")), settings.get("train_split"), settings.get("max_images")]
    asked = [_place(settings.get("val_data") or settings.get("data")), past.split(split)]
    # the same weights may lie at another place: the spec may differ, the fingerprint may not
    known = {side: {key: value for key, value in towers[side].items() if key != "spec"} for side in towers}
    return {
        "training data": _known(learned),
        f"{split} split": _known(asked),
        "counted images": _counts(result) if result else None,
        "vision tower": known["vision"],
        "text tower": known["text"],
    }


def _known(values: list[Any]) -> list[Any] | None:
    return None if all(value is None for value in values) else values


def _place(data: str | None) -> str | None:
    """Return one name for a file, however it was called."""
    file = Path(os.path.expandvars(data)).expanduser() if data else None
    return str(file.resolve()) if file is not None and file.exists() else data


def _counts(result: dict[str, Any]) -> list[int]:
    return [int(result[key]) for key in ("num_images", "num_captions")]


def _read_result(file: str, split: str) -> tuple[Row, dict[str, Any]]:
    """Read what `lilt evaluate --json` printed: the row, and what else must have been the same."""
    try:
        result = dict(json.loads(Path(file).read_text(encoding="utf-8")))
        of = result["of"]
        row = Row(
            run=of["model"],
            policy=of["policy"] or AS_IT_IS,
            trained=of["trained"],
            total=of["total"],
            percent=100 * of["trained"] / of["total"],
            mean_recall_before=None,
            mean_recall=result["mean_recall"],
            text_to_image_r1=result["text_to_image"]["R@1"],
            image_to_text_r1=result["image_to_text"]["R@1"],
            seconds=None,
            peak_bytes=None,
            adapter_bytes=of["adapter_bytes"],
            num_images=int(result["num_images"]),
            finished=True,
            differs=(),
        )
        return row, {f"{split} split": [_place(of["data"]), of["split"]], "counted images": _counts(result)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is not what `lilt evaluate MODEL --data MANIFEST --json` prints ({error!r}); expected such a "
            "file, one of --task conserve(…), or the folder of a run; write it anew"
        ) from None


def _read_run(run: str, split: str) -> tuple[Row, dict[str, Any]]:
    """Read a run folder: the row, and what else must have been the same."""
    past = read_past(run)
    contract, end, result = past.contract, past.end or {}, past.result(split)
    before = past.before if split == "test" else None
    to_image, to_text = (None if result is None else result[side]["R@1"] for side in SIDES)
    row = Row(
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
        finished=not past.stopped,
        differs=(),
        measure=_measure(past, split) if result is None else None,
    )
    return row, circumstances(past, split)


def _measure(past: Past, split: str) -> str | None:
    """Return the command that measures a model; a run that was trained has noted what it was asked to."""
    if past.stopped or past.end is not None:
        return None
    run = shlex.quote(str(past.folder))
    data = "" if past.settings.get("data") else " --data MANIFEST"
    asked = shlex.quote(past.split(split) or split)
    return f"lilt evaluate {run}{data} --split {asked} --json > {result_file(str(past.folder))}"


def result_file(run: str) -> str:
    """Return the name of a file for what is measured of a run, as a shell reads it."""
    return shlex.quote(f"{Path(run).absolute().name}.json")
