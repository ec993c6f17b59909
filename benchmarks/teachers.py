"""Does a self-supervised teacher beat a supervised one? Both are pretrained by one script on the same scenes.

python benchmarks/teachers.py [--seeds 0,1,2] [--steps 400] [--epochs 4]
The demo's pictures: a ViT is pretrained by recipes/pretrain_demo.py's own pretext (two views find each other and redraw
the scene), and another, by the same loop, on the same scenes, views and number of steps, to name shape and colour of
the largest thing. Each then teaches an untrained ViT of half the depth beside half of the demo's text tower, with
contrastive distillation and a bank; beside them no teacher at all. Validation decides, recall of the test split is
shown. Appends one JSON line a run to results/teachers.jsonl. About ten minutes a teacher and three a run on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rsicd import collect
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes"))

import pretrain_demo as demo  # noqa: E402

from lilt.demo.lexicon import COLOURS, SHAPES  # noqa: E402
from lilt.demo.scenes import IMAGE_PX, RADIUS_PX, Scene, stream  # noqa: E402

RESULTS = HERE / "results" / "teachers.jsonl"
CLASSES = [(shape, colour) for shape in SHAPES for colour in COLOURS]
STUDENT = (
    f"timm:vit_tiny_patch16_224?pretrained=false&image_px={IMAGE_PX}&patch_size={demo.PATCH_PX}"
    f"&embed_dim={demo.WIDTH}&depth={demo.DEPTH // 2}&num_heads={demo.HEADS}&pool=cls"
)


def class_of(scene: Scene) -> int:
    """Return the class of a scene: shape and colour of its largest thing, the first of equals."""
    largest = max(scene.things, key=lambda thing: RADIUS_PX[thing.size])
    return CLASSES.index((largest.shape, largest.colour))


class Named(nn.Module):
    """A view of a scene, half of its patches hidden, and the class of the scene."""

    def __init__(self, labels: Callable[[], Tensor]) -> None:
        super().__init__()
        self.tower = demo.vision_tower()
        self.tower.patch_drop = PatchDropout(0.5)
        self.head = nn.Linear(demo.WIDTH, len(CLASSES))
        self.labels = labels

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss of normalised images (B, 3, H, W), of two views each as in the other pretext."""
        seen = torch.cat([demo.views(images, generator)[1] for _ in range(2)])
        return F.cross_entropy(self.head(self.tower(seen)), self.labels().repeat(2))


def pretrain(kind: str, folder: Path, steps: int, batch_size: int = 128, pool: int = 20_000, seed: int = 0) -> None:
    """Write a teacher as a folder for timm."""
    if kind == "self-supervised":
        demo.pretrain_vision(folder, steps, batch_size, pool, seed)
        return
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = demo.pixel_pool(pool, demo.IMAGE_POOL_SEED + seed)
    scenes = stream(demo.IMAGE_POOL_SEED + seed)
    classes = torch.tensor([class_of(next(scenes)) for _ in range(pool)])
    rows = torch.zeros(batch_size, dtype=torch.long)

    def batch() -> Tensor:
        rows.copy_(torch.randint(pool, (batch_size,), generator=generator))
        return (pixels[rows].float() / 255 - demo.MEAN) / demo.STD

    pretext = Named(lambda: classes[rows])
    demo.fit(pretext, batch, steps, generator, "supervised")
    demo.save_vision(pretext.tower, folder)


def main() -> None:
    """Pretrain what is missing, teach, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400, help="of pretraining")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--runs", type=Path, default=Path("runs/teachers"))
    given, more = parser.parse_known_args()
    for seed in given.seeds.split(","):
        for kind in ("none", "self-supervised", "supervised"):
            options = ["--vision", STUDENT, "--text", f"demo?layers={demo.DEPTH // 2}", "--policy", "full"]
            options += ["--shared", "transformer(n=1)", "--projection", "none", "--lr", "1e-3", "--seed", seed]
            options += ["--epochs", given.epochs, "--eval_every", given.epochs, *more]
            if kind != "none":
                teacher = given.runs / f"{kind}-{given.steps}"
                if not teacher.exists():
                    draft = teacher.with_name(f".{teacher.name}-draft")
                    pretrain(kind, draft, given.steps)
                    draft.rename(teacher)
                options += ["--teacher", f"timm:{teacher}?pool=cls", "--distill", "contrastive(bank=2048)"]
            folder = given.runs / f"{kind}-of-{given.steps}-{seed}"
            command = [sys.executable, "-m", "lilt", "train", "--overwrite", "true", "--output", str(folder)]
            subprocess.run([*command, *options], check=True)
            row: dict[str, Any] = {"teacher": kind, "pretraining_steps": given.steps} | collect(folder)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as stream_out:
                stream_out.write(json.dumps(row) + "\n")
            print(
                f"{kind}, seed {seed}: validation {row['val_mean_recall']:.2f}, test {row['test']['mean_recall']:.2f}"
            )
    print(f"written to {RESULTS}; now run: python benchmarks/report.py")


if __name__ == "__main__":
    main()
