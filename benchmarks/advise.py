"""Does the order of `lilt advise` agree with what training finds? RSICD, 4 vision towers x 3 text towers.

LILT_KIT=FOLDER python benchmarks/advise.py [--pairs 2000] [--store FOLDER]
Advice: pairs of the train split, each image with a caption of its own. Measured: linear heads on the frozen outputs of
the same pairs, trained for a fixed number of steps, three seeds; mean recall on images of the val split, one caption
each. That is `lilt train --policy frozen --augment none` for so many steps, but each tower is run once for all of its
pairs. Writes one JSON line a pair, and one of rank correlations for each score, to results/advise.jsonl. --store keeps
the features between runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilt.advise import Chosen, View, choose, match
from lilt.advise.advice import compare_towers
from lilt.advise.layers import OUTPUT, Reader, read_captions, read_images
from lilt.advise.step import PROJECTION, predict
from lilt.budgets.counter import Counter
from lilt.build import read_split
from lilt.evaluate import retrieval
from lilt.losses import softmax_contrastive
from lilt.model import Scale, build_projection
from lilt.model.projection import Projection
from lilt.towers import build_tower
from lilt.towers.loading import load_weights
from lilt.towers.spec import expand
from lilt.train.optim import make_schedule

RESULTS = Path(__file__).parent / "results" / "advise.jsonl"
WEIGHTS = "$LILT_KIT/weights"
DEIT = "timm:deit_tiny_patch16_224?pool=cls+mean"
TRAINED = f"{DEIT}&weights={WEIGHTS}/deit_tiny_patch16_224.fp16.safetensors"
MINILM = f"hf:{WEIGHTS}/all-MiniLM-L6-v2?pool=mean"
VISION = {
    "deit_tiny": TRAINED,
    "deit_tiny, 6 blocks": f"{TRAINED}&layers=6",
    "mobilenetv2": "py:advise:mobilenet",
    "deit_tiny, random": f"{DEIT}&pretrained=false",
}
TEXT = {"MiniLM": MINILM, "MiniLM, 3 blocks": f"{MINILM}&layers=3", "MiniLM, random": f"{MINILM}&pretrained=false"}
K, BATCH, SEEDS = 10, 128, (0, 1, 2)
SCORES = ("mutual_knn", "cka", "best_mutual_knn", "best_cka")


def mobilenet() -> nn.Module:
    """The convolutional tower of the kit, whose weights came from elsewhere: its own padding and normalisation."""
    body: Any = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=0, pad_type="same")
    load_weights(body, expand(f"{WEIGHTS}/mobilenetv2_100_same.fp16.safetensors"))
    body.pretrained_cfg = {**body.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return body


def look(spec: str, side: str, items: list[str], px: int, file: Path) -> tuple[dict[str, Tensor], float]:
    """Return the features of all layers of a tower, and the CPU milliseconds for one image or caption."""
    if not file.exists():
        began = time.process_time()
        reader = Reader(build_tower(spec, side, image_px=px).eval(), every=True)
        device, silent = torch.device("cpu"), lambda count: None
        if side == "vision":
            seen = read_images({spec: reader}, items, device, silent, batch_size=32)
            assert len(seen.which) == len(items), seen.faults
            rows = seen.rows
        else:
            rows, _ = read_captions(reader, items, device, silent, batch_size=64, max_tokens=32)
        layers = {name: part.contiguous() for name, part in reader.split(rows).items()}
        spent = 1000 * (time.process_time() - began) / len(items)
        save_file({**layers, "cpu_ms": torch.tensor(spent)}, file)
        print(f"{spec}: {spent:.1f} ms each", flush=True)
    stored = load_file(file)
    return {name: part for name, part in stored.items() if name != "cpu_ms"}, float(stored["cpu_ms"])


def joined(heads: Projection, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of both towers as unit rows in the joint space."""
    return F.normalize(heads.through(image, "vision"), dim=-1), F.normalize(heads.through(text, "text"), dim=-1)


def train_heads(image: Tensor, text: Tensor, pairs: int, steps: int, seed: int) -> float:
    """Train linear heads on the outputs of the first pairs and return the mean recall on the others."""
    torch.manual_seed(seed)
    heads, scale = build_projection(PROJECTION, image.shape[1], text.shape[1]), Scale()
    optimizer = torch.optim.AdamW([*heads.parameters(), *scale.parameters()], lr=1e-3, weight_decay=0.02, fused=True)
    schedule = make_schedule(optimizer, steps, steps // 20, 0.01)
    for _ in range(steps):
        some = torch.randperm(pairs)[:BATCH]
        loss, _ = softmax_contrastive(*joined(heads, image[some], text[some]), scale(), rows=slice(0, len(some)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        scale.clamp_()
    with torch.no_grad():
        asked, found = joined(heads, image[pairs:], text[pairs:])
    return float(retrieval(asked, found, torch.arange(len(asked)))["mean_recall"])


def spearman(x: list[float], y: list[float]) -> float:
    """Return the correlation of ranks; equal values share theirs."""
    ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) - 1) / 2 for a in v] for v in (x, y)]
    return float(torch.corrcoef(torch.tensor(ranks, dtype=torch.double))[0, 1])


def measure(given: argparse.Namespace, store: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Look at each tower once, then compare and train each pair; the second list is about layers of single towers."""
    data, root = expand("$LILT_KIT/captions/rsicd.jsonl"), expand("$LILT_KIT")
    train, val = (choose(read_split(data, name, root), n, name) for name, n in (("train", given.pairs), ("val", 0)))
    pairs = Chosen([*train.images, *val.images], [*train.captions, *val.captions])
    shape = f"{given.pairs}_{given.image_px}"
    seen: dict[str, tuple[dict[str, Tensor], float]] = {}
    for side, specs, items in (("vision", VISION, pairs.images), ("text", TEXT, pairs.captions)):
        for name, spec in specs.items():
            file = store / f"{name.replace(', ', '_').replace(' ', '_')}_{shape}.safetensors"
            seen[name] = look(spec, side, items, given.image_px, file)
    began = time.process_time()
    views = {n: {k: View.of(k, r[: given.pairs], K) for k, r in rows.items()} for n, (rows, _) in seen.items()}
    advice = {(v, t): compare_towers((v, views[v]), (t, views[t]), given.policy) for v in VISION for t in TEXT}
    print(f"compared in {time.process_time() - began:.1f} s of CPU time", flush=True)
    bare = {n: build_tower(s, "vision", image_px=given.image_px) for n, s in VISION.items()}
    bare |= {n: build_tower(s, "text") for n, s in TEXT.items()}
    counter = Counter()
    rows = []
    for (v, t), found in advice.items():
        step = predict(bare[v], bare[t], given.policy, 64, 32, counter)
        image, text = seen[v][0][OUTPUT], seen[t][0][OUTPUT]
        recalls = [train_heads(image, text, given.pairs, given.steps, seed) for seed in SEEDS]
        # the five best pairs of layers; there are hundreds
        costs = {"trainable": step.trainable, "step_flops": step.flops}
        record = asdict(found) | costs | {"layers": [asdict(m) for m in found.layers[:5]]}
        ms = {"vision_cpu_ms": seen[v][1], "text_cpu_ms": seen[t][1]}
        rows.append(record | ms | {"val_mean_recall": recalls, "val_images": len(pairs) - given.pairs})
        print(f"{v} + {t}: kNN {found.mutual_knn:.1f} CKA {found.cka:.2f} mR {sum(recalls) / 3:.2f}", flush=True)
    layers = [
        by_layer(v, {k: (x, views[v][k]) for k, x in seen[v][0].items()}, text, views["MiniLM"][OUTPUT], given)
        for v, text in ((v, seen["MiniLM"][0][OUTPUT]) for v in ("deit_tiny", "mobilenetv2"))
    ]
    return rows, layers


def by_layer(
    name: str, layers: dict[str, tuple[Tensor, View]], text: Tensor, ear: View, given: argparse.Namespace
) -> dict[str, Any]:
    """Train heads on each layer of one tower, and on the output of MiniLM: is the layer that is advised the best?"""
    found: list[dict[str, Any]] = []
    for layer, (image, eye) in layers.items():
        recall = train_heads(image, text, given.pairs, given.steps, SEEDS[0])
        like = match(eye, ear)
        found.append({"layer": layer, "mutual_knn": like.mutual_knn, "cka": like.cka, "val_mean_recall": recall})
        print(f"{name}, {layer}: kNN {like.mutual_knn:.1f} CKA {like.cka:.2f} mR {recall:.2f}", flush=True)
    recalls = [row["val_mean_recall"] for row in found]
    agreement = {score: spearman([row[score] for row in found], recalls) for score in ("mutual_knn", "cka")}
    return {"vision": name, "text": "MiniLM", "by_layer": found, "spearman": agreement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--image_px", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--policy", default="layernorm")
    parser.add_argument("--store", default="", help="folder that keeps features; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(given.store or temporary)
        store.mkdir(parents=True, exist_ok=True)
        rows, layers = measure(given, store)
    recalls = [sum(row["val_mean_recall"]) / len(SEEDS) for row in rows]
    agreement = {score: spearman([row[score] for row in rows], recalls) for score in SCORES}
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "image_px": given.image_px,
        "steps": given.steps,
    }
    lines = [about | row for row in rows] + [about | row for row in layers]
    lines.append(about | {"spearman": agreement, "tower_pairs": len(rows)})
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"Spearman with mean recall: {agreement}; written to {RESULTS}")


if __name__ == "__main__":
    main()
