"""Pretrain the two towers of the offline default (lilt/demo/towers), each on one modality only.

Command:   OMP_NUM_THREADS=1 python recipes/pretrain_demo.py --overwrite      (torch >= 2.9, for its Muon)
Hardware:  about 12 min with one thread on a busy 2-core machine (vision 8 min, text 4 min); no accelerator
Expected:  last loss about 0.38 (vision, 400 steps) and 0.46 (text, 400 steps); 3.3 MB in fp16. Aligned by LayerNorm and
           linear heads on the demo set (6 epochs, batch 64), text->image R@1 on the held-out split is about 20 %,
           against 10 % for heads on frozen towers and 0.25 % by chance

Vision sees scenes without captions, text sees captions of other scenes without images: nothing here ever holds a
pair. Both pools are drawn without regard to the held-out combinations of the test split. That is the honest twin of
real pretrained towers, which have seen everything in one modality; what is held out is the *pairing*.
"""

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers.patch_dropout import PatchDropout
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import DistilBertConfig, DistilBertForMaskedLM, PreTrainedTokenizerFast

from lilt.demo import TEXT, VISION
from lilt.demo.captions import captions
from lilt.demo.lexicon import words
from lilt.demo.render import render
from lilt.demo.scenes import IMAGE_PX, stream

WIDTH, DEPTH, HEADS = 128, 4, 4
PATCH_PX = 8
SHAPE: dict[str, Any] = {
    "img_size": IMAGE_PX, "patch_size": PATCH_PX, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS,
}  # fmt: skip
MEAN, STD = 0.5, 0.25
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTEXT = 64
IMAGE_POOL_SEED, TEXT_POOL_SEED = 1_000_000, 2_000_000  # added to --seed; the demo set itself draws from other seeds


def pixel_pool(count: int, seed: int) -> Tensor:
    """Unlabelled scenes as bytes (count, 3, H, W)."""
    scenes = stream(seed)
    pixels = bytearray(b"".join(render(next(scenes)).tobytes() for _ in range(count)))
    shape = (count, IMAGE_PX, IMAGE_PX, 3)
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape).permute(0, 3, 1, 2).contiguous()


def caption_pool(scenes: int, seed: int) -> list[str]:
    """Captions whose images are never drawn."""
    drawn, rng = stream(seed), random.Random(seed)
    return [caption for _ in range(scenes) for caption in captions(next(drawn), rng)]


def vision_tower() -> Any:
    """A small timm ViT whose position embedding starts as sines: from noise, places take far longer to emerge."""
    tower: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SHAPE)
    place = torch.arange(IMAGE_PX // PATCH_PX).float()
    angles = place[:, None] / 100 ** torch.linspace(0, 1, WIDTH // 4)
    line = torch.cat([angles.sin(), angles.cos()], 1)
    side = len(place)
    grid = torch.cat([line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)], 2)
    with torch.no_grad():
        tower.pos_embed.copy_(F.pad(grid.flatten(0, 1), (0, 0, 1, 0))[None])
    return tower


def views(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move and zoom normalised images (B, 3, H, W) a little; then again under another light and behind clouds."""

    def noise(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * 2 - 1

    frame = torch.eye(2, 3).repeat(len(images), 1, 1) * (1 + 0.08 * noise(1, 1))
    frame[:, :, 2:] = noise(2, 1) * (5 / (IMAGE_PX / 2))  # up to 5 px: far less than would change a relation
    grid = F.affine_grid(frame, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    clouds = F.interpolate(noise(3, 4, 4), size=IMAGE_PX, mode="bicubic")
    light = (0.1 * clouds + 0.15 * noise(3, 1, 1)) / STD
    return moved, moved * (1 + 0.1 * noise(1, 1, 1)) + light


class MatchedViews(nn.Module):
    """Two views of a scene, half of their patches hidden: their CLS must find each other, and redraw the scene.

    The contrast spreads what distinguishes scenes over CLS, the redrawing keeps what the contrast has no need for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tower = vision_tower()
        # set here and not by its argument, which would be saved with the tower
        self.tower.patch_drop = PatchDropout(0.5)
        self.project = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH))
        self.redraw = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, 3 * (IMAGE_PX // 2) ** 2))

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of normalised images (B, 3, H, W)."""
        moved, seen = (torch.cat(pair) for pair in zip(*(views(images, generator) for _ in range(2)), strict=True))
        cls = self.tower(seen)
        return contrast(self.project(cls)) + F.mse_loss(self.redraw(cls), F.avg_pool2d(moved, 2).flatten(1))


def contrast(projected: Tensor) -> Tensor:
    """InfoNCE of (2B, width), where row i and row B + i are two views of one thing."""
    one, other = F.normalize(projected, dim=1).chunk(2)
    likeness, own = one @ other.T / 0.1, torch.arange(len(one))
    return (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2


class MaskedCaptions(nn.Module):
    """Masked-language modelling, with two masked views of a caption whose CLS must find each other.

    The words left in view are guessed too: in this grammar no word depends on which colour another one names, so
    guessing hidden words alone would teach the tower to forget all but "some colour, some shape".
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = DistilBertConfig(
            vocab_size=vocabulary,
            dim=WIDTH,
            n_layers=DEPTH,
            n_heads=HEADS,
            hidden_dim=4 * WIDTH,
            max_position_embeddings=CONTEXT,
            dropout=0.0,
            attention_dropout=0.0,
        )
        self.model = DistilBertForMaskedLM(config)
        self.project = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, WIDTH))

    def forward(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of token ids (B, L), padded with 0."""
        ids = ids.repeat(2, 1)
        lot, share = (torch.rand(shape, generator=generator) for shape in (ids.shape, (len(ids), 1)))
        words_in = ids >= len(SPECIAL_TOKENS)
        masked = ids.masked_fill(words_in & (lot < 0.4 * share), SPECIAL_TOKENS.index("[MASK]"))
        states = self.model.distilbert(input_ids=masked, attention_mask=(ids != 0).long()).last_hidden_state
        guess = self.model.vocab_layer_norm(F.gelu(self.model.vocab_transform(states[words_in])))
        return F.cross_entropy(self.model.vocab_projector(guess), ids[words_in]) + contrast(self.project(states[:, 0]))


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word of the texts, in alphabetical order behind the special tokens."""
    vocabulary = [*SPECIAL_TOKENS, *sorted({",", ".", ":"} | {word for text in texts for word in words(text)})]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=CONTEXT, **names)


def fit(pretext: nn.Module, batch: Callable[[], Tensor], steps: int, generator: torch.Generator, name: str) -> None:
    """Train for some steps: Muon for the matrices inside the blocks, AdamW for all else, warm-up and cosine."""
    inside = {id(p) for n, p in pretext.named_parameters() if p.ndim == 2 and (".blocks." in n or ".layer." in n)}
    matrices = [p for p in pretext.parameters() if id(p) in inside]
    others = [p for p in pretext.parameters() if id(p) not in inside]
    # AdamW alone needs about twice the steps for the same vision loss
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=1.5e-3),
    ]
    schedules = [LambdaLR(optimizer, lambda step: _rate(step, steps)) for optimizer in optimizers]
    columns = [
        *Progress.get_default_columns()[:3],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    ]
    pretext.train()
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=steps, loss="")
        for _ in range(steps):
            loss = pretext(batch(), generator)
            loss.backward()
            nn.utils.clip_grad_norm_(pretext.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            pretext.zero_grad()
            progress.update(task, advance=1, loss=f"loss {loss.item():.3f}")


def _rate(step: int, steps: int) -> float:
    return min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))


def pretrain_vision(folder: Path, steps: int, batch_size: int, pool: int, seed: int) -> None:
    """Write a folder for timm.create_model("local-dir:FOLDER", pretrained=True)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = pixel_pool(pool, IMAGE_POOL_SEED + seed)
    pretext = MatchedViews()

    def batch() -> Tensor:
        rows = torch.randint(pool, (batch_size,), generator=generator)
        return (pixels[rows].float() / 255 - MEAN) / STD

    fit(pretext, batch, steps, generator, "vision")
    save_vision(pretext.tower, folder)


def save_vision(tower: Any, folder: Path) -> None:
    """Write a pretrained tower as a folder for timm, in half precision."""
    contract = {
        "input_size": [3, IMAGE_PX, IMAGE_PX],
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "tag": "lilt_demo",
    }
    tower.patch_drop = nn.Identity()
    # the shape goes in by name: only newer timm writes it by itself
    config = {"pretrained_cfg": contract}
    timm.models.save_for_hf(tower.half(), str(folder), model_config=config, model_args=SHAPE, safe_serialization=True)


def pretrain_text(folder: Path, steps: int, batch_size: int, pool: int, seed: int) -> None:
    """Write a folder for AutoModel.from_pretrained and AutoTokenizer.from_pretrained."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    texts = caption_pool(pool, TEXT_POOL_SEED + seed)
    tokenizer = word_tokenizer(texts)
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    pretext = MaskedCaptions(len(tokenizer))

    def batch() -> Tensor:
        rows = ids[torch.randint(len(ids), (batch_size,), generator=generator)]
        return rows[:, : int((rows != 0).sum(1).max())]

    fit(pretext, batch, steps, generator, "text")
    pretext.model.distilbert.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # the sentence-transformers way of saying how to pool: here the mean reads far better than CLS
    (folder / "1_Pooling").mkdir()
    declared = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(declared, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Pretrain both towers, or one."""
    parser = argparse.ArgumentParser(description="Pretrain the towers of the offline default.")
    parser.add_argument("--vision", type=Path, default=VISION, help="folder to write")
    parser.add_argument("--text", type=Path, default=TEXT, help="folder to write")
    parser.add_argument("--only", choices=("vision", "text"), help="leave the other tower as it is")
    parser.add_argument("--vision-steps", type=int, default=400)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--vision-batch-size", type=int, default=128)
    parser.add_argument("--text-batch-size", type=int, default=96)
    parser.add_argument("--pool", type=int, default=20000, help="scenes per modality")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    runs = {
        "vision": (pretrain_vision, args.vision, args.vision_steps, args.vision_batch_size),
        "text": (pretrain_text, args.text, args.text_steps, args.text_batch_size),
    }
    chosen = [run for name, run in runs.items() if args.only in (None, name)]
    for _, folder, *_ in chosen:
        if folder.exists() and not args.overwrite:
            parser.error(f"{folder} exists; a tower would be lost: give --overwrite, or another folder")
    for pretrain, folder, steps, batch_size in chosen:
        draft = folder.with_name(f".{folder.name}-draft")
        shutil.rmtree(draft, ignore_errors=True)
        pretrain(draft, steps, batch_size, args.pool, args.seed)
        shutil.rmtree(folder, ignore_errors=True)  # only now that its successor is whole
        draft.rename(folder)


if __name__ == "__main__":
    main()
