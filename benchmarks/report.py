"""Write RESULTS.md anew from results/*.jsonl: python benchmarks/report.py"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from distillation_report import distillation, teachers
from policies_report import policies
from scaling_report import scaling

HERE = Path(__file__).parent
HEAD = """# Results

Made by `python benchmarks/report.py` from `results/*.jsonl`; a script printed every number. LOG.md keeps what failed.

"""
RSICD = """## RSICD: tuning policies compared

`LILT_KIT=FOLDER python benchmarks/rsicd.py`: DeiT-tiny (ImageNet-1k) + all-MiniLM-L6-v2, published split (8,734 train,
1,094 validation, 1,093 test images), {px} px, batch {batch}, {epochs} passes, one random caption an image and pass,
flips and quarter turns, best epoch by validation mean recall; lilt's adapters at 1e-3, their default then. mR is the
mean of R@1/5/10 both ways on the test split (1,093 images, 5 captions each, ties against the model; chance 0.3).
Seconds (training and validation) and memory on {machine}, beside other work: compare them with care.

"""
CONSERVED = """## Gained, kept, lost

`LILT_KIT=FOLDER python benchmarks/conservation.py --study FOLDER`: runs of the policy study, probed before and after.
Top-1, percent. Scenes: RSICD's {classes} scene classes on its test split (k nearest neighbours and a linear probe of
the vision tower, a linear probe of the text tower on captions; 1,000 items to learn from). ImageNet: the vision
tower's own classifier on its features, 1,000 photographs, at {px} px as trained and at 224 px as pretrained.

"""
SUPPORT = """## Which policy works on which tower

`python benchmarks/support.py`: {specs} policies on {families} tower families built from config without weights.
{alive} of {pairs} pairs were applied and each of their trained tensors proved to move the output; {refused} are refused
before anything is changed:

"""
SUPPORT_LONG = """`python benchmarks/support.py --long`: {specs} compositions of two on the same families, {pairs:,}
pairs. {alive:,} are applied and alive, {refused:,} refused (one part cannot work there, or both
want one weight), and {dead} applied and dead.

"""
LORA_SPEED = """## LoRA's step beside peft's

`python benchmarks/lora_speed.py`: the same tower, targets and rank, interleaved in one run; medians of process time
over that of peft {peft} with the same kind of update, on {machine}, batch {batch}.

"""
LOSS_MEMORY = """## Losses in linear memory

`python benchmarks/loss_memory.py`: peak memory of loss and gradients beyond the embeddings, D = {dim}, on {machine}.

"""
CACHED = """## What micro-batches cost

`python benchmarks/cached_gradients.py`: a step in {pieces} micro-batches over the same step in one, batch {batch_size},
medians of {rounds} rounds in which all take turns, on {machine}. Promised by FLOPs of matrix products: everything
forward once, then the step behind the frozen front of each tower; of eight pieces or less the last is passed once. In
many pieces the promise is that of the last column (4/3 for all of the towers, 3/2 for norms in all blocks, …).

"""
STEP_COST = """## Step time: measured over promised

`python benchmarks/step_cost.py`: {about}; medians of {rounds} rounds in which all policies take turns, on
{machine}. Both columns are relative to full training. Beyond 1.10 is what the count of matrix products leaves out:
`ia3` multiplies every key, value and activation of an MLP, which moves memory and is no product;
`lora(targets=all)` adds two products of rank 8 to every map, too thin at widths of 192 and 256 to run at the speed
of the others (forward 22 %, backward 64 % more than `layernorm`, where 6 % more is promised).

"""
REUSED = """## Training from what frozen parts gave once

`python benchmarks/reuse.py`: seconds of an epoch without and with reuse, on {machine}.
Promised: FLOPs of a step over FLOPs of what is left of it behind the front, with captions as long as batches are
padded to. What remains of `frozen` is overhead of the loop, {least:.0f} to {most:.0f} ms a step.

"""
PEERS = """## Beside other libraries

`python benchmarks/peers.py`: a training step on the same towers, batch, optimizer and clipping, synthetic pairs;
medians of rounds in which all take turns ({rounds} for the last size), on {machine}; {versions}. lilt
is: how many times the speed of that way. Memory beyond the weights, in a process of its own. error: of the
gradient in pieces against the one in one piece, over its largest entry, the worst tensor (open_clip's is that of the
factor on the cosines). sentence-transformers is its loss in a plain loop: its trainer would only add to that.

"""
ADVICE = """## Advice before training

`LILT_KIT=FOLDER python benchmarks/advise.py`: RSICD at {image_px} px, 2,000 training pairs; mR on validation
of linear heads on frozen towers after {steps} steps. Mutual nearest neighbours (k = 10, chance {chance:.1f}
%) and CKA of the outputs.

"""
KILLED = """## Killed and resumed

`python benchmarks/kill.py`: runs killed with SIGKILL at random moments and resumed, against the same run left alone.

"""
LITERATURE = """
Published on the same test split, unimodal pretraining: VSE++ 10.4, AMFMN 16.4, GaLR 19.0, ViT+BERT 20.5, Swin-T+BERT
23.4 (all weights trained, test-selected), KAMCL 26.1.
"""


def read(name: str) -> list[dict[str, Any]]:
    """Read the rows of one benchmark."""
    file = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(columns: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; columns are parted by |, and those that begin with < are left-aligned."""
    names = columns.split("|")
    lines = [[name.removeprefix("<") for name in names], *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    head, _, body = text.partition("\n")
    marks = "".join("---|" if name.startswith("<") else "--:|" for name in names)
    return f"{head}\n|{marks}\n{body}\n"


def rsicd(rows: list[dict[str, Any]]) -> str:
    """Return the section on policies, one table per setting."""
    text = ""
    settings = sorted({(r["image_px"], r["batch_size"], r["epochs"], r["machine"]) for r in rows}, key=str)
    for px, batch, epochs, machine in settings:
        chosen = [
            r
            for r in rows
            if (r["image_px"], r["batch_size"], r["epochs"], r["machine"]) == (px, batch, epochs, machine)
        ]
        text += RSICD.format(px=px, batch=batch, epochs=f"{epochs:g}", machine=machine)
        text += (
            "| policy | trained | % | val mR | test mR | t→i R@1/5/10 | i→t R@1/5/10 | s | peak MiB | adapter MiB |\n"
        )
        text += "|---|--:|--:|--:|--:|---|---|--:|--:|--:|\n"
        for r in sorted(chosen, key=lambda r: r["test"]["mean_recall"]):
            recalls = [
                " / ".join(f"{r['test'][side][f'R@{k}']:.1f}" for k in (1, 5, 10))
                for side in ("text_to_image", "image_to_text")
            ]
            name = r["policy"] if r["lr"] is None else f"{r['policy']}, lr {r['lr']:g}"
            name += ", fp32" if r["precision"] == "no" else ""
            text += (
                f"| `{name}`, seed {r['seed']} | {r['trained']:,} | {100 * r['trained'] / r['total']:.2f} | "
                f"{r['val_mean_recall']:.2f} | {r['test']['mean_recall']:.2f} | {recalls[0]} | {recalls[1]} | "
                f"{r['seconds']:,.0f} | {r['peak_bytes'] / 2**20:,.0f} | {r['adapter_bytes'] / 2**20:.2f} |\n"
            )
        text += LITERATURE + "\n"
    return text


def conservation(rows: list[dict[str, Any]]) -> str:
    """Return the section on what towers gained and kept."""
    if not rows:
        return ""
    names = ("knn", "probe", "text_probe", "classifier")

    def cells(recall: str, values: dict[str, float], large: dict[str, float]) -> tuple[str, ...]:
        return recall, *(f"{values[name]:.1f}" for name in names), f"{large['classifier']:.1f}"

    first = rows[0]
    lines = [("before", "", *cells("", first["before"], first["at_pretrained_px"]["before"]))]
    for r in sorted(rows, key=lambda r: r["test"]["mean_recall"]):
        share = f"{100 * r['trained'] / r['total']:.2f}"
        recall = f"{r['test']['mean_recall']:.2f}"
        lines.append((f"`{r['policy']}`", share, *cells(recall, r["after"], r["at_pretrained_px"]["after"])))
    columns = "<policy|%|test mR|scenes, kNN|scenes, probe|captions, probe|ImageNet, {px} px|ImageNet, 224 px"
    head = CONSERVED.format(classes=30, px=first["image_px"])
    return head + table(columns.format(px=first["image_px"]), lines)


def support(rows: list[dict[str, Any]]) -> str:
    """Return the section on which policy works on which tower: what is refused, and why."""
    if not rows:
        return ""
    families = len({row["family"] for row in rows})
    specs = list(dict.fromkeys(row["policy"] for row in rows))
    alive = sum(row["verdict"] == "ok" for row in rows)
    text = SUPPORT.format(specs=len(specs), families=families, pairs=len(rows), alive=alive, refused=len(rows) - alive)
    text += "| policy | towers that cannot take it | reason |\n|---|---|---|\n"
    for spec in specs:
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row["policy"] == spec and row["verdict"] != "ok":
                said = re.search(r"tower '.*?':? (?:has )?(.*?); it has", row["reason"])
                reasons.setdefault(said[1] if said else row["reason"], []).append(row["family"])
        for reason, towers in reasons.items():
            text += f"| `{spec.replace('|', '&#124;')}` | {', '.join(towers)} | {reason.replace('|', '&#124;')} |\n"
    return text + "\n"


def support_long(rows: list[dict[str, Any]]) -> str:
    """Return the lines on compositions of two policies."""
    if not rows:
        return ""
    ok, refused, dead = (sum(len(row[verdict]) for row in rows) for verdict in ("ok", "refused", "dead"))
    return SUPPORT_LONG.format(specs=len(rows), pairs=ok + refused + dead, alive=ok, refused=refused, dead=dead)


def lora_speed(rows: list[dict[str, Any]]) -> str:
    """Return the section on LoRA's step time."""
    if not rows:
        return ""
    cells = (
        (r["tower"], r["variant"], f"{r['trained']:,}", f"{r['over_peft']:.2f}", f"{r['over_full']:.2f}") for r in rows
    )
    return LORA_SPEED.format(**rows[-1]) + table("<tower|<variant|trained|step / peft's|step / full", cells)


def loss_memory(rows: list[dict[str, Any]]) -> str:
    """Return the section on what the losses keep."""
    if not rows:
        return ""
    cells = (
        (
            f"`{r['loss']}`", f"{r['rows']:,}", f"{r['chunk']:,}" if r["chunk"] else "all", f"{r['peak_mib']:,.0f}",
            f"{r['seconds']:.1f}",
        )
        for r in sorted(rows, key=lambda r: (r["loss"], r["rows"]))
    )  # fmt: skip
    return LOSS_MEMORY.format(**rows[-1]) + table("<loss|rows|tile|MiB|s", cells)


def cached_gradients(rows: list[dict[str, Any]]) -> str:
    """Return the section on micro-batches."""
    text = ""
    for size in dict.fromkeys(r["size"] for r in rows):
        chosen = [r for r in rows if r["size"] == size]
        text += CACHED.format(**chosen[-1]) if not text else ""
        cells = (
            (
                f"`{r['policy'].replace('//', '` and `')}`", f"{r['promised']:.2f}", f"{r['measured']:.2f}",
                f"{r['measured'] / r['promised']:.2f}", f"{1 + (r['promised'] - 1) / (1 - 1 / r['pieces']):.2f}",
            )
            for r in chosen
        )  # fmt: skip
        text += table(f"<policy ({size})|promised|measured|measured / promised|in many pieces", cells)
    return text


def step_cost(rows: list[dict[str, Any]]) -> str:
    """Return the section on step times."""
    if not rows:
        return ""
    cells = (
        (
            f"`{r['policy']}`", f"{r['trainable']:,}", f"{r['predicted']:.2f}", f"{r['measured']:.2f}",
            f"{r['measured_over_predicted']:.2f}",
        )
        for r in rows
    )  # fmt: skip
    return STEP_COST.format(**rows[-1]) + table("<policy|trained|promised|measured|measured / promised", cells)


def reuse(rows: list[dict[str, Any]]) -> str:
    """Return the section on reuse."""
    if not rows:
        return ""
    cells = (
        (
            r["towers"], f"`{r['policy']}`", f"{r['batch_size']}", f"{r['off_s']:.1f}", f"{r['on_s']:.2f}",
            f"{r['off_s'] / r['on_s']:.1f}", f"{r['promised']:.1f}", f"{r['off_s'] / r['on_s'] / r['promised']:.2f}",
        )
        for r in rows
    )  # fmt: skip
    columns = "<towers|<policy|batch|s off|s on|times faster|promised|measured / promised"
    left = [1000 * r["on_s"] * r["batch_size"] / r["images"] for r in rows if r["policy"] == "frozen"]
    return REUSED.format(**rows[-1], least=min(left), most=max(left)) + table(columns, cells)


def peers(rows: list[dict[str, Any]]) -> str:
    """Return the section on other libraries."""
    if not rows:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in rows[-1]["versions"].items())
    cells = (
        (
            r["size"], r["group"], r["way"], f"{r['batch_size']}", f"{r['pieces']}",
            f"{r['pairs_per_second']:.3g}", f"{r['lilt_over_this']:.2f}", f"{r['peak_bytes'] / 2**20:,.0f}",
            f"{r['file_bytes'] / 2**20:.1f}", "" if r["gradient_error"] is None else f"{r['gradient_error']:.0e}",
        )
        for r in rows
    )  # fmt: skip
    head = PEERS.format(**{**rows[-1], "versions": versions})
    return head + table("<towers|<step|<way|batch|pieces|pairs/s|lilt is|MiB|file MiB|error", cells)


def advice(rows: list[dict[str, Any]]) -> str:
    """Return the section on what `lilt advise` foretells."""
    pairs = [r for r in rows if "spearman" not in r and "by_layer" not in r]
    if not pairs:
        return ""
    cells = (
        (r["vision"], r["text"], f"{r['mutual_knn']:.1f}", f"{r['cka']:.2f}", f"{fmean(r['val_mean_recall']):.2f}")
        for r in sorted(pairs, key=lambda r: -r["mutual_knn"])
    )
    text = ADVICE.format(**pairs[0]) + table("<vision|<text|neighbours %|CKA|val mR", cells)
    for r in rows:
        if "tower_pairs" in r:
            said = ", ".join(f"{name} {value:.2f}" for name, value in r["spearman"].items())
            text += f"Spearman's correlation with the recall over {r['tower_pairs']} pairs: {said}. More in LOG.md.\n\n"
    return text


def kill(rows: list[dict[str, Any]]) -> str:
    """Return the section on killed runs."""
    if not rows:
        return ""
    cells = (
        (
            r["data"], " ".join(r["options"]) or "as in the script", f"{r['kills']}",
            "the same bits" if r["same"] else "ANOTHER",
        )
        for r in rows
    )  # fmt: skip
    return KILLED + table("<data|<options|kills|<file", cells)


SECTIONS = {
    "rsicd": rsicd,
    "policies": policies,
    "conservation": conservation,
    "distillation": distillation,
    "teachers": teachers,
    "support": support,
    "support_long": support_long,
    "lora_speed": lora_speed,
    "step_cost": step_cost,
    "cached_gradients": cached_gradients,
    "reuse": reuse,
    "loss_memory": loss_memory,
    "kill": kill,
    "peers": peers,
    "scaling": scaling,
    "advise": advice,
}


def main() -> None:
    text = HEAD + "".join(section(read(name)) for name, section in SECTIONS.items())
    (HERE / "RESULTS.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"written to {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
