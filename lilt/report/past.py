"""What a run left in its folder, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lilt import checkpoint
from lilt.train import read_metrics
from lilt.train.folder import CONFIG

SIDES = ("text_to_image", "image_to_text")
RANKS = ("R@1", "R@5", "R@10", "median_rank")


@dataclass(frozen=True)
class Past:
    """A run: the contract of its checkpoint, its settings ({} where it has none), and its lines by kind.

    steps are of training, looks of validation; before is the recall on the test split of the untrained model, end the
    last line of a finished run; what there is none of is None.
    """

    folder: Path
    contract: dict[str, Any]
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    looks: list[dict[str, Any]]
    before: dict[str, Any] | None
    end: dict[str, Any] | None

    def result(self, part: str) -> dict[str, Any] | None:
        """Return the recalls of the checkpoint on the "test" split, or on the "val" split, which chose it."""
        own = {k.removeprefix(f"{part}/"): v for k, v in self.contract["metrics"].items() if k.startswith(f"{part}/")}
        if "mean_recall" not in own:
            return None
        return own | {side: {rank: own[f"{side}/{rank}"] for rank in RANKS} for side in SIDES}

    @property
    def stopped(self) -> bool:
        """Whether a training has not come to its end; of a merged model, or one saved from Python, there is none."""
        merged = "merge/from" in self.contract["metrics"]
        return self.end is None and not merged and bool(self.settings or self.steps or self.looks)

    @property
    def chosen_step(self) -> int | None:
        """The step that the checkpoint is from."""
        step = self.contract["metrics"].get("val/step")
        return None if step is None else int(step)

    @property
    def policy(self) -> str:
        """What was trained: one policy, or that of the vision and that of the text tower."""
        return checkpoint.settings_of(self.contract).policy_name

    @property
    def adapter_bytes(self) -> int:
        """The size of the trained tensors as a file."""
        return checkpoint.adapter_bytes(self.folder)

    def split(self, part: str) -> str | None:
        """Return what the run calls its "test" or "val" split, None where it has none."""
        name = self.settings.get(f"{part}_split")
        return None if name == "none" else name


def read_past(run: str) -> Past:
    """Read a run folder. Raises ValueError where there is no checkpoint in it."""
    folder = Path(run)
    contract = checkpoint.read_contract(folder)
    file = folder / CONFIG
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lines = read_metrics(folder)
    tests = [line for line in lines if line.get("split") == "test"]
    before = next((line["result"] for line in tests if line["step"] == 0 and "best_step" not in line), None)
    end = next((line for line in reversed(tests) if "best_step" in line), None)
    looks = [line for line in lines if line.get("split") == "val"]
    return Past(folder, contract, settings, [line for line in lines if "loss" in line], looks, before, end)
