"""Small pairs of towers on the meta device, and what a step of them costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilt.budgets import Cost, meta_batch, step_cost
from lilt.model import Scale, TwoTower, build_projection
from lilt.policies import apply, parse_policy, plan
from lilt.towers import Tower, build_tower
from lilt.towers.meta import without_weights
from tests.towers.families import tiny

DIM = 16


def reader() -> Tower:
    """A text tower without any matrix product: five tokens of width 6 and a norm."""
    embed = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6))
    return build_tower(embed, "text", lambda texts: torch.ones(len(texts), 5, dtype=torch.long))


def family(name: str) -> Tower:
    """A tiny tower of a family of the conformance suite."""
    return without_weights(tiny(name))


def tuned(vision: Tower, text: Tower, vision_policy: str, text_policy: str) -> TwoTower:
    """Join copies of two towers with a policy applied to each."""
    vision, text = without_weights(vision), without_weights(text)
    with torch.device("meta"):
        for tower, policy in ((vision, vision_policy), (text, text_policy)):
            apply(plan(parse_policy(policy, tower.side), tower), tower)
        return TwoTower(vision, text, build_projection(f"linear(dim={DIM})", vision.dim, text.dim), Scale())


def cost(vision: Tower, text: Tower, vision_policy: str, text_policy: str = "frozen", pairs: int = 3) -> Cost:
    """Return what a step costs."""
    core = tuned(vision, text, vision_policy, text_policy)
    return step_cost(core, *meta_batch(vision, text, pairs, 7))


def product(rows: int, width: int, out: int) -> int:
    """FLOPs of a matrix product."""
    return 2 * rows * width * out


def heads(vision: Tower, text: Tower, pairs: int, below: tuple[bool, bool] = (False, False)) -> int:
    """FLOPs of projection and loss; below: whether the gradient goes on into each tower."""
    maps = zip((vision, text), below, strict=True)
    return sum((3 if down else 2) * product(pairs, t.dim, DIM) for t, down in maps) + 3 * product(pairs, DIM, pairs)


def saved_on_cpu(core: TwoTower, images: Tensor, tokens: dict[str, Tensor]) -> int:
    """Bytes that a real forward keeps for backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*core.parameters(), *core.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = core.train()(images, tokens)
        logits = out.scale * out.image @ out.text.T
        rows = torch.arange(len(logits))
        loss = nn.functional.cross_entropy(logits, rows) + nn.functional.cross_entropy(logits.T, rows)
    assert loss.requires_grad
    return sum(storage.nbytes() for at, storage in kept.items() if at not in own)
