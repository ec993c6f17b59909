"""Everything needed to do a run again, and to notice that something else was done."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from lilt.report.markup import Html, el, fold, grid, section, terms
from lilt.report.past import Past
from lilt.train.folder import CONFIG


def recipe(past: Past) -> Html:
    """Return the section."""
    contract = past.contract
    towers = [
        (side, tower["spec"], tower["pool"], str(tower["dim"]), tower["fingerprint"])
        for side, tower in contract["towers"].items()
    ]
    # a fingerprint in full is what a reader compares with; the style lets it break anywhere
    heads = ("tower", "spec", "pool", "width", "SHA-256 of its base weights")
    prints = grid(heads, towers, "towers", words=len(heads))
    inputs = {side: tower["input"] for side, tower in contract["towers"].items()}
    return section(
        "recipe",
        "Do it again",
        el("pre", el("code", command(past))),
        terms(_facts(past)),
        el("div", prints, class_="specs"),
        terms(contract["versions"].items()),
        fold(f"Settings ({CONFIG})", el("pre", _settings(past))),
        fold("What each tower is given", el("pre", json.dumps(inputs, indent=2, ensure_ascii=False))),
    )


def command(past: Past) -> str:
    """Return the command that makes such a run again."""
    metrics, again = past.contract["metrics"], f"{past.folder}-again"
    if "merge/from" in metrics:
        run, scale = metrics["merge/from"], metrics["merge/scale"]
        return f"lilt merge {shlex.quote(run)} --scale {scale:g} --output {shlex.quote(again)}"
    config = shlex.quote(str(past.folder / CONFIG))
    return f"lilt train --config {config} --output {shlex.quote(again)}"


def _facts(past: Past) -> Iterator[tuple[str, str]]:
    yield "seed", str(past.contract["model"]["seed"])
    for key in ("data", "val_data", "batch_size", "epochs", "max_steps", "precision"):
        if past.settings.get(key) is not None:
            yield key, str(past.settings[key])
    if past.end is not None and "processes" in past.end:
        yield "processes", f"{past.end['processes']} x {past.end['device']}"
    yield "SHA-256 of the adapter", past.contract["adapter_sha256"]


def _settings(past: Past) -> str:
    file = Path(past.folder) / CONFIG
    if not file.is_file():
        return json.dumps(past.contract["model"], indent=2)
    return file.read_text(encoding="utf-8")
