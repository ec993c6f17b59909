"""What towers gained, kept and lost by alignment: the same probes on them before and after, one row a run.

LILT_KIT=FOLDER python benchmarks/conservation.py RUN [RUN …]      or --study FOLDER for the runs of policies.py
Gained: RSICD's scene classes, which its file names carry, by k nearest neighbours and a linear probe of the vision
tower, and by a linear probe of the text tower on captions (1,000 items a part, drawn at random, always the same).
Kept: top-1 of the vision tower's own classifier on its features, 1,000 ImageNet photographs, at the resolution of the
run and at that of its pretraining, to which trained positions are resampled as timm does it. Appends one JSON line a
run to results/conservation.jsonl; a run that is there already is passed over. Two minutes a run on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import policies
from policies_report import ALL, best_rate, names
from rsicd import collect
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed

import lilt
from lilt.checkpoint import ADAPTER, read_contract, settings_of
from lilt.evaluate import Setting, parse_task
from lilt.evaluate.subject import Subject

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "conservation.jsonl"
SCENES = "data=$LILT_KIT/captions/rsicd.jsonl,image_root=$LILT_KIT,label_from=([a-z]+)_,max_images=1000"
KEPT = "classifier(data=$LILT_KIT/zeroshot/imagenet1k.jsonl,image_root=$LILT_KIT,label=index)"
TASKS = {
    "knn": f"knn({SCENES})",
    "probe": f"probe({SCENES})",
    "text_probe": f"probe({SCENES},side=text)",
    "classifier": KEPT,
}
PRETRAINED_PX = 224
Values = dict[str, float]
known: dict[Any, Values] = {}  # what base towers can do, by what they are and the resolution


def measured(subject: Subject, tasks: dict[str, str]) -> Values:
    """Return top-1 of each task, percent."""
    return {name: dict(parse_task(spec)(subject))["top1"] for name, spec in tasks.items()}


def before_and_after(model: lilt.DualEncoder, tasks: dict[str, str]) -> dict[str, Values]:
    """Return what the base towers and the tuned ones can do; the base is measured once for all runs on it."""
    subject = Subject(model, Setting())
    after = measured(subject, tasks)
    base = (*(tower.fingerprint for tower in (model.core.vision, model.core.text)), model.config.image_px, *tasks)
    if base not in known:
        with subject.at_base() as other:
            known[base] = measured(other, tasks)
    return {"before": known[base], "after": after}


def at_pretrained_px(folder: Path) -> dict[str, Values]:
    """Return top-1 at the resolution that the vision tower was pretrained at."""
    config = asdict(settings_of(read_contract(folder))) | {"image_px": PRETRAINED_PX}
    if config["policy"].startswith("random"):  # which draws others where a tensor has another size
        config["policy"] = "full"
    model = lilt.DualEncoder.build(**config)
    tensors, trained = load_file(folder / ADAPTER), model.core.trained()
    for name, tensor in tensors.items():
        if trained[name].shape != tensor.shape:  # the table of positions
            side = math.isqrt(trained[name].shape[1] - 1)
            tensors[name] = resample_abs_pos_embed(tensor, [side, side])
    model.core.load_state_dict(tensors, strict=False)
    return before_and_after(model, {"classifier": KEPT})


def chosen(runs: Path) -> list[Path]:
    """Return the runs of the policy study, the best rate of each policy by validation, fewest steps and seed first."""
    rows = [row for row in map(json.loads, policies.RESULTS.read_text().splitlines()) if row["study"] == "steps"]
    whole = [row for row in rows if row["images"] == ALL and row["seed"] == 0]
    best = (best_rate([row for row in whole if row["policy"] == name]) for name in names(whole))
    return [policies.folder_of(runs, best_runs[0]["key"]) for best_runs in best]


def main() -> None:
    """Measure what is missing and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--study", type=Path, help="folder with the runs of policies.py: its --runs")
    given = parser.parse_args()
    os.environ["LILT_KIT"]  # the tasks read it: fail early
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    done = {row["run"] for row in rows}
    for folder in [*given.runs, *(chosen(given.study) if given.study else [])]:
        if folder.name in done:
            continue
        model = lilt.load(folder)
        row: dict[str, Any] = {"run": folder.name} | collect(folder) | before_and_after(model, TASKS)
        row["at_pretrained_px"] = at_pretrained_px(folder)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        said = ", ".join(f"{name} {row['before'][name]:.1f} to {row['after'][name]:.1f}" for name in TASKS)
        print(f"{row['policy']}: {said}", flush=True)
    print(f"written to {RESULTS}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
