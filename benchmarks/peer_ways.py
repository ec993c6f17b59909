"""One training step as each library does it, on the same towers; `peers.py` measures them."""

from __future__ import annotations

import tempfile
import warnings
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from accelerate import Accelerator
from open_clip_train.train import train_one_epoch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from lilt.data import Batch
from lilt.losses import Softmax
from lilt.model import Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.towers import ImageContract, TowerSpec
from lilt.towers.meta import NoTokenizer
from lilt.towers.text import from_hf_text
from lilt.towers.vision import from_timm, wrap_vision
from lilt.train.learner import Learner
from lilt.train.optim import make_optimizer
from lilt.train.reuse import find_fronts
from lilt.train.step import Objective, backward

TOKENS, DIM, LR = 25, 256, 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# name of timm, pixels, width, blocks and heads of the vision tower; width and blocks of the text tower
SIZES = {
    "tiny": ("vit_tiny_patch16_224", 128, 192, 12, 3, 256, 4),
    "base": ("vit_base_patch16_224", 224, 768, 12, 12, 768, 12),
    "large": ("vit_large_patch16_224", 224, 1024, 24, 16, 1024, 24),
}


class Shape(NamedTuple):
    """Which towers, how many pairs a step, and in how many pieces where a way takes several."""

    size: str
    rows: int
    pieces: int


class Pairs(NamedTuple):
    """A batch as all ways take it."""

    images: Tensor
    ids: Tensor
    mask: Tensor


def make_batch(shape: Shape) -> Pairs:
    """Return a synthetic batch."""
    px = SIZES[shape.size][1]
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (shape.rows, TOKENS))
    return Pairs(*(t.to(DEVICE) for t in (torch.randn(shape.rows, 3, px, px), ids, torch.ones_like(ids))))


def bert(size: str) -> BertConfig:
    """Return the configuration of the text tower."""
    width, layers = SIZES[size][-2:]
    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )


def vit(size: str) -> ViTConfig:
    """Return the configuration of the vision tower in transformers."""
    _, px, width, layers, heads = SIZES[size][:5]
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=px,
    )


class Way(ABC):
    """A library's step."""

    module: nn.Module
    pieces = 1
    optimizer: torch.optim.Optimizer

    def start(self, module: nn.Module, pieces: int) -> None:
        """Take a model and make its optimizer."""
        self.module, self.pieces = module.to(DEVICE).train(), pieces
        self.optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=LR)

    @abstractmethod
    def compute(self, batch: Pairs, pieces: int) -> None:
        """Add the gradient of a batch."""

    def step(self, batch: Pairs) -> None:
        """Train one step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.compute(batch, self.pieces)
        nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()

    def gradient(self, batch: Pairs, pieces: int) -> dict[str, Tensor]:
        """Return the gradient of a batch."""
        self.module.zero_grad(set_to_none=True)
        self.compute(batch, pieces)
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def file_bytes(self) -> int:
        """Return the size of what the library saves of the model."""
        return sum(value.nbytes for value in self.module.state_dict().values())


class Lilt(Way):
    """Ours."""

    def __init__(self, shape: Shape, policy: str, pieces: int = 1, library: str = "timm"):
        name, px = SIZES[shape.size][:2]
        torch.manual_seed(0)
        if library == "timm":
            body = timm.create_model(name, num_classes=0, img_size=px)
            vision = from_timm(body, name, TowerSpec("timm"))
        else:
            body = ViTModel(vit(shape.size), add_pooling_layer=False)
            vision = wrap_vision(body, ImageContract(px), "vit", TowerSpec("hf"))
        text = from_hf_text(BertModel(bert(shape.size)), "bert", TowerSpec("hf"), NoTokenizer())
        for tower in (vision, text):
            apply(plan(parse_policy(policy, tower.side), tower), tower)
        core = TwoTower(vision, text, build_projection(f"linear(dim={DIM})", vision.dim, text.dim), Scale())
        self.fronts = find_fronts(core)
        self.start(Learner(core, None, self.fronts), pieces)
        self.core, self.accelerator = core, Accelerator()
        self.objective = Objective(Softmax())
        self.optimizer = make_optimizer(core, LR, LR, 0.02, 0.999)

    def compute(self, batch: Pairs, pieces: int) -> None:
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        tokens = {"input_ids": batch.ids, "attention_mask": batch.mask}
        whole = Batch(batch.images, tokens, rows, rows, torch.ones_like(rows, dtype=torch.bool))
        micro = None if pieces == 1 else len(rows) // pieces
        backward(self.module, self.objective, [whole], self.accelerator, micro, None, self.fronts)

    def file_bytes(self) -> int:
        return len(save({name: p.detach().cpu().contiguous() for name, p in self.core.trained().items()}))


class OpenClip(Way):
    """open_clip's model of a timm and a transformers tower, in its own loop over one batch."""

    def __init__(self, shape: Shape, locked: bool, pieces: int = 1):
        name, px = SIZES[shape.size][:2]
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            bert(shape.size).save_pretrained(folder)
            vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": px}
            text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_proj_type": "linear"}
            text |= {"hf_tokenizer_name": folder, "hf_pooler_type": "cls_pooler"}
            model = open_clip.CustomTextCLIP(DIM, vision, text, output_dict=True)
        model.visual.trunk.set_input_size((px, px))
        if locked:
            model.lock_image_tower(unlocked_groups=0)
        self.start(model, pieces)
        self.loss = open_clip.ClipLoss()
        self.told = Namespace(
            device=DEVICE, precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, horovod=False,
            grad_clip_norm=1.0, rank=0, local_rank=0, log_local=False, log_every_n_steps=10**9, world_size=1,
            batch_size=shape.rows, wandb=False,
        )  # fmt: skip

    def compute(self, batch: Pairs, pieces: int) -> None:
        """Run its loop for one step; the gradient is still there when the optimizer has been."""
        self.told.accum_freq = pieces
        self.told.batch_size = len(batch.ids) // pieces
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = {"train": OneBatch(list(zip(batch.images.chunk(pieces), batch.ids.chunk(pieces), strict=True)))}
            train_one_epoch(self.module, data, self.loss, 0, self.optimizer, None, None, None, self.told)

    def step(self, batch: Pairs) -> None:
        self.compute(batch, self.pieces)

    def gradient(self, batch: Pairs, pieces: int) -> dict[str, Tensor]:
        """Undo what its loop does behind the gradient: the update, and the clipping."""
        weights = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.told.grad_clip_norm = None
        found = super().gradient(batch, pieces)
        self.module.load_state_dict(weights)
        return found


class OneBatch:
    """What open_clip's loop reads: the pieces of one batch."""

    def __init__(self, pieces: list[tuple[Tensor, Tensor]]):
        self.pieces = pieces
        self.num_batches, self.num_samples = len(pieces), sum(len(ids) for _, ids in pieces)
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        """There is one."""

    def __iter__(self) -> Any:
        return iter(self.pieces)


class DualEncoderLoop(Way):
    """transformers' VisionTextDualEncoder, with peft's LoRA or all of it, in a plain loop."""

    def __init__(self, shape: Shape, lora: bool):
        torch.manual_seed(0)
        towers = vit(shape.size), bert(shape.size)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(*towers, projection_dim=DIM)
        model: Any = VisionTextDualEncoderModel(config)
        if lora:
            heads = ["visual_projection", "text_projection"]
            # BERT's names and ViT's: with the first alone peft adapts BERT and says nothing of ViT
            names = ["query", "key", "value", "q_proj", "k_proj", "v_proj"]
            told = LoraConfig(r=8, lora_alpha=16, target_modules=names, modules_to_save=heads)
            model = get_peft_model(model, told)
            model.base_model.model.logit_scale.requires_grad_(True)
        self.lora = lora
        self.start(model, 1)

    def compute(self, batch: Pairs, pieces: int) -> None:
        self.module(
            input_ids=batch.ids, pixel_values=batch.images, attention_mask=batch.mask, return_loss=True
        ).loss.backward()

    def file_bytes(self) -> int:
        if not self.lora:
            return super().file_bytes()
        with tempfile.TemporaryDirectory() as folder:
            self.module.save_pretrained(folder)  # type: ignore[operator]
            return (Path(folder) / "adapter_model.safetensors").stat().st_size


class SentenceTransformers(Way):
    """sentence-transformers' loss in both directions over two towers, in a plain loop; its scale is fixed."""

    def __init__(self, shape: Shape, pieces: int = 1):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses

        name, px = SIZES[shape.size][:2]
        torch.manual_seed(0)
        towers = Sides(timm.create_model(name, num_classes=0, img_size=px), BertModel(bert(shape.size)))
        model = SentenceTransformer(modules=[towers], device=DEVICE)
        both: Any = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        scale = Scale()().item()
        self.whole = losses.MultipleNegativesRankingLoss(model, scale=scale, **both)
        rows = shape.rows // max(pieces, 1)
        self.cached = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=rows, **both)
        self.start(model, pieces)

    def compute(self, batch: Pairs, pieces: int) -> None:
        features = [{"pixel_values": batch.images}, {"input_ids": batch.ids, "attention_mask": batch.mask}]
        loss = self.whole if pieces == 1 else self.cached
        loss(features, torch.arange(len(batch.ids), device=batch.ids.device)).backward()


class Sides(nn.Module):
    """Two towers and their heads as a module of sentence-transformers: features in, sentence_embedding beside them."""

    def __init__(self, vision: Any, text: Any):
        super().__init__()
        self.vision, self.text = vision, text
        self.heads = nn.ModuleDict(
            {"image": nn.Linear(vision.num_features, DIM), "text": nn.Linear(text.config.hidden_size, DIM)}
        )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        if "pixel_values" in features:
            rows = self.heads["image"](self.vision(features["pixel_values"]))
        else:
            mask = features["attention_mask"]
            rows = self.heads["text"](self.text(features["input_ids"], mask).last_hidden_state[:, 0])
        return {**features, "sentence_embedding": rows}


def _pieced(make: Callable[..., Way], **options: Any) -> Callable[[Shape], Way]:
    return lambda shape: make(shape, pieces=shape.pieces, **options)


GROUPS: Mapping[str, Mapping[str, Callable[[Shape], Way]]] = {
    "image tower locked": {
        "lilt": partial(Lilt, policy="lit"),
        "open_clip": partial(OpenClip, locked=True),
    },
    "image tower locked, in pieces": {
        "lilt": _pieced(Lilt, policy="lit"),
        "open_clip": _pieced(OpenClip, locked=True),
    },
    "all trained": {
        "lilt": partial(Lilt, policy="full"),
        "open_clip": partial(OpenClip, locked=False),
        "sentence-transformers": partial(SentenceTransformers),
    },
    "all trained, in pieces": {
        "lilt": _pieced(Lilt, policy="full"),
        "open_clip": _pieced(OpenClip, locked=False),
        "sentence-transformers": _pieced(SentenceTransformers),
    },
    "all trained, transformers' towers": {
        "lilt": partial(Lilt, policy="full", library="hf"),
        "VisionTextDualEncoder": partial(DualEncoderLoop, lora=False),
    },
    "LoRA, transformers' towers": {
        "lilt": partial(Lilt, policy="lora", library="hf"),
        "VisionTextDualEncoder and peft": partial(DualEncoderLoop, lora=True),
    },
}
