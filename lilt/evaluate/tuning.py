"""Fine-tuning of one tower under a fresh linear layer: a policy, a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilt.data import Batches, Order, make_loader
from lilt.evaluate.examples import Batch, Collate, Encoded, Pictures
from lilt.evaluate.free_copy import free_copy
from lilt.evaluate.rows import Advance
from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Task
from lilt.evaluate.texts import join_pair
from lilt.policies import parse_policy
from lilt.towers import Inputs, Tower

WARMUP = 0.1  # of all steps
CLIP_NORM = 1.0
Compare = Callable[[Tensor, Tensor], Tensor]  # outputs (B, C) and what was said of each row (B,) to a loss ()


class Tuned(nn.Module):
    """A tower and a linear layer on its pooled features, or on what `join_pair` makes of those of two texts."""

    def __init__(self, tower: Tower, outputs: int, inputs: int):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.dim * (1 if inputs == 1 else 4), outputs)

    def forward(self, inputs: list[Inputs]) -> Tensor:
        """Return the outputs (B, C): logits, or one number."""
        rows = [self.tower(one).float() for one in inputs]
        out: Tensor = self.head(rows[0] if len(rows) == 1 else join_pair(*rows))
        return out

    def train(self, mode: bool = True) -> Tuned:
        """Set the mode; a tower that is not trained stays in eval mode, and batch statistics stay as they are."""
        super().train(mode)
        if not any(p.requires_grad for p in self.tower.parameters()):
            self.tower.eval()
        for module in self.tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def count(self) -> int:
        """Return how many values of the tower are trained."""
        return sum(p.numel() for p in self.tower.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Recipe:
    """How to tune: AdamW, linear warm-up over a tenth of the steps and linear decay to nothing."""

    epochs: int
    lr: float | None  # None: the policy's own for each tensor
    head_lr: float
    weight_decay: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class OnPolicy(Task):
    """A task that trains a copy of a tower, which starts as it is in the run, with a policy on it.

    lr: instead of the policy's own learning rates. Every process trains the same by itself.
    """

    policy: str = "layernorm"
    epochs: int = 3
    lr: float | None = None
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 32
    seed: int = 0

    def check_policy(self, side: str) -> None:
        """Raise ValueError for a policy that is none, or a number that has to be positive and is not."""
        parse_policy(self.policy, side)
        for name in ("epochs", "batch_size", "head_lr", "lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{self.name}: {name}={value:g}; expected more than 0; give a positive number")

    def fit(
        self,
        subject: Subject,
        side: str,
        outputs: int,
        examples: Pictures | Encoded,
        collate: Collate,
        score: Callable[[Tuned], float],
        compare: Compare = F.cross_entropy,
    ) -> tuple[Tuned, int]:
        """Train under a fresh linear layer to outputs; return what scores best after an epoch, and its number.

        Within `own_stream`, for it draws: the layer, the order, dropout.
        """
        recipe = Recipe(self.epochs, self.lr, self.head_lr, self.weight_decay, self.batch_size, self.seed)
        steps = self.epochs * max(1, len(examples) // self.batch_size)
        model = Tuned(free_copy(subject, side, self.policy), outputs, examples.inputs).to(subject.device)
        with subject.setting.alone(self.name, steps) as advance:
            workers = subject.setting.workers
            epoch = tune(model, examples, collate, recipe, lambda: score(model), workers, advance, compare)
        return model, epoch


def tune(
    model: Tuned,
    examples: Pictures | Encoded,
    collate: Collate,
    recipe: Recipe,
    score: Callable[[], float],
    workers: int = 0,
    advance: Advance = lambda count: None,
    compare: Compare = F.cross_entropy,
) -> int:
    """Train, keep what scores best after an epoch, the earlier of equals, and return its number from 1 on.

    Every process does all of it by itself. Raises ValueError for a loss that is not finite.
    """
    device = model.head.weight.device
    batches = Batches(Order([len(examples)], seed=recipe.seed), recipe.batch_size)
    steps = recipe.epochs * batches.steps_per_epoch
    optimizer = torch.optim.AdamW(_groups(model, recipe))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = make_loader(examples, workers, batch_sampler=batches, collate_fn=collate, generator=generator)
    source: Iterator[Batch] = iter(loader)
    best, kept, number = -math.inf, {name: p.detach().clone() for name, p in model.trained().items()}, 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for _ in range(batches.steps_per_epoch):
            _step(model, next(source), optimizer, device, compare)
            schedule.step()
            advance(1)
        model.eval()
        if (found := score()) > best:
            best, number = found, epoch
            kept = {name: p.detach().clone() for name, p in model.trained().items()}
    with torch.no_grad():
        for name, parameter in model.trained().items():
            parameter.copy_(kept[name])
    return number


def _step(model: Tuned, batch: Batch, optimizer: torch.optim.Optimizer, device: torch.device, compare: Compare) -> None:
    if not batch.inputs:  # nothing of it could be read
        return
    loss = compare(model([_on(inputs, device) for inputs in batch.inputs]), batch.labels.to(device))
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss of fine-tuning is {loss.item()}; expected a finite one; use a lower lr or head_lr (lr=1e-4, say)"
        )
    loss.backward()
    nn.utils.clip_grad_norm_(list(model.trained().values()), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _groups(model: Tuned, recipe: Recipe) -> list[dict[str, Any]]:
    """Group what is trained by learning rate and decay; tensors of one dimension or none are not decayed."""
    fates = model.tower.fates or {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.trained().items():
        fate = fates.get(name.removeprefix("tower.body."))
        own = recipe.head_lr if fate is None else fate.lr
        rate = own if fate is None or recipe.lr is None else recipe.lr
        groups.setdefault((rate, recipe.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in sorted(groups.items())]


def _factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def _on(inputs: Inputs, device: torch.device) -> Inputs:
    return inputs.to(device) if isinstance(inputs, Tensor) else {k: v.to(device) for k, v in inputs.items()}


@contextmanager
def own_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from one seed for a while and leave the generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
