"""Encoders written by hand, of which nothing is recognised but linear layers: the role maps are for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilt.towers import Tower, build_tower
from tests.towers.families import CONTRACT, VOCABULARY, Patches, word_tokenizer

WIDTH, HIDDEN = 32, 48


class Rms(nn.Module):
    """A normalisation."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class Mixer(nn.Module):
    """An attention with projections under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wq_a, self.wk_a, self.wv_a, self.wo_a = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.wq_a, self.wk_a, self.wv_a))
        mask = None if keep is None else keep[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo_a(mixed.transpose(1, 2).flatten(2))


class Wide(nn.Module):
    """An MLP of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Bare(nn.Module):
    """An MLP of bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(WIDTH, HIDDEN) / WIDTH**0.5)
        self.w2 = nn.Parameter(torch.randn(HIDDEN, WIDTH) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1) @ self.w2


class Stage(nn.Module):
    """One repeated unit."""

    def __init__(self, mlp: type[nn.Module] = Wide):
        super().__init__()
        self.r1, self.mix, self.r2, self.ff = Rms(), Mixer(), Rms(), mlp()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.mix(self.r1(x), attention_mask)
        return x + self.ff(self.r2(x))


class Eye(nn.Module):
    """Images -> tokens (B, 16, 32); its units are attributes, registered in another order than they are called."""

    def __init__(self, mlp: type[nn.Module] = Wide):
        super().__init__()
        self.last = Rms()
        self.stage_b, self.stage_a = Stage(mlp), Stage(mlp)
        self.embed = Patches()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.stage_b(self.stage_a(self.embed(images))))


class Listed(nn.Module):
    """The same with its units in a list."""

    def __init__(self, mlp: type[nn.Module] = Wide, depth: int = 2):
        super().__init__()
        self.embed, self.last = Patches(), Rms()
        self.stages = nn.ModuleList([Stage(mlp) for _ in range(depth)])

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for stage in self.stages:
            x = stage(x)
        return self.last(x)


class Reader(nn.Module):
    """Token tensors -> tokens (B, L, 32); its units are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(VOCABULARY, WIDTH), Rms()
        self.stage_a, self.stage_b = Stage(), Stage()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        x, keep = self.words(input_ids), attention_mask.bool()
        return self.last(self.stage_b(self.stage_a(x, attention_mask=keep), attention_mask=keep))


ROLES = {
    "stage_*": "block", "**.r?": "norm", "last": "norm", "**.mix": "attention", "**.wq_a": "attention.q",
    "**.wk_a": "attention.k", "**.wv_a": "attention.v",
}  # fmt: skip
LISTED = {pattern: word for pattern, word in ROLES.items() if word != "block"}


def seeded(make: Any, *args: Any) -> Any:
    """Build under a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args)


def private(make: Any, roles: Any, *args: Any, side: str = "vision") -> Tower:
    """Wrap a hand-written encoder with a role map."""
    contract = CONTRACT if side == "vision" else word_tokenizer()
    return build_tower(seeded(make, *args).eval(), side, contract, roles=roles)


def eye() -> tuple[nn.Module, Any, dict[str, str]]:
    """Return what `py:tests.towers.private:eye` stands for."""
    return seeded(Eye), CONTRACT, ROLES


def reader() -> tuple[nn.Module, Any, None]:
    """Return the same for text, without a map."""
    return seeded(Reader), word_tokenizer(), None
