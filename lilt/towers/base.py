"""A tower: somebody's encoder, how it wants its input, and what it is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from lilt.registry import Registry
from lilt.towers.anatomy import CONTAINERS, NOTHING, Anatomy, Named, survey
from lilt.towers.roles import find_named
from lilt.towers.structure import structure

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class ImageContract:
    """How a vision tower wants its images: side in pixels, normalisation, resampling; or its own callable."""

    image_px: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"  # bilinear | bicubic | nearest | lanczos
    crop: float = 1.0  # share of the resized image that the centre crop of evaluation keeps
    transform: Callable[[Image.Image], Tensor] | None = None  # a user's own preprocess; replaces all of the above


Text = str | tuple[str, str]  # of two, what separates them is the tokenizer's: [CLS] one [SEP] other [SEP], say


class Tokenizer(Protocol):
    """How a text tower wants its captions."""

    context_tokens: int

    def encode(self, texts: Sequence[Text], max_tokens: int | None = None) -> tuple[list[dict[str, list[int]]], int]:
        """Return one encoding per text or pair of texts, special tokens included, and how many texts were cut."""
        ...

    def pad(self, encodings: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return int64 tensors (B, L) padded to the longest."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint must remember to notice another tokenizer."""
        ...


class Tokens(NamedTuple):
    """Token features (B, L, W), which are real (B, L; None: all), how many lead without content (CLS, registers)."""

    features: Tensor
    mask: Tensor | None = None
    prefix: int = 0


class Encoded(NamedTuple):
    """What became of a batch: pooled (B, W), its `Tokens` where asked for, hidden (B, H) of a shared encoder."""

    pooled: Tensor
    tokens: Tokens | None = None
    hidden: Tensor | None = None


class Tower(nn.Module):
    """An encoder of one side with one pooled output; subclasses know how one library runs it.

    forward: image (B, 3, H, W) or token tensors (B, L) -> (B, dim). tokens: -> `Tokens` (B, L, width). encode: both.
    """

    default_pool = "own"

    def __init__(self, body: nn.Module, side: str, spec: str, pool: str | None, contract: ImageContract | Tokenizer):
        super().__init__()
        self.body: Any = body
        self.side = side
        self.spec = spec
        self.pool = pool or self.default_pool
        self.contract = contract
        self.dim = 0
        self.anatomy = Anatomy((), ())
        self.roles: dict[str, str] | None = None  # what its owner says of its parts: path pattern -> role
        self.fingerprint = ""  # of the weights
        self.structure = ""  # of all else that decides what they compute
        self.still: frozenset[str] = frozenset()  # modules of the body that stay in eval mode
        self.fates: dict[str, Any] | None = None  # set when a policy is applied: trained parameter -> why

    def run(self, inputs: Inputs) -> Any:
        """Run the body up to its last layer; what comes out is the library's own."""
        raise NotImplementedError

    def read(self, raw: Any, inputs: Inputs) -> Tokens:
        """Read the tokens out of what `run` returned."""
        raise NotImplementedError

    def own(self, raw: Any, inputs: Inputs) -> Tensor:
        """Pool as the library itself does, (B, dim)."""
        raise NotImplementedError

    def tokens(self, inputs: Inputs) -> Tokens:
        """Return the token features of the last layer."""
        return self.read(self.run(inputs), inputs)

    def encode(self, inputs: Inputs, tokens: bool = False) -> Encoded:
        """Run the body once and return the pooled features, as forward does, and if asked the tokens.

        Raises ValueError if tokens are asked of a body that gives none.
        """
        raw = self.run(inputs)
        found = self.read(raw, inputs) if tokens or self.pool != "own" else None
        if tokens and found is not None and found.features.ndim != 3:
            raise ValueError(
                f"the {self.side} tower {self.spec!r} gives {tuple(found.features.shape)} with pool={self.pool}, and "
                "the shared encoder or the projection reads tokens (B, L, width); use ?pool=cls or ?pool=mean where "
                "the tower has them, or shared=none or mlp and another projection"
            )
        pooled = self.own(raw, inputs) if found is None or self.pool == "own" else pool_tokens(found, self.pool)
        return Encoded(pooled, found if tokens else None)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.encode(inputs).pooled

    def train(self, mode: bool = True) -> Tower:
        """Set the mode; what is to stay still stays in eval mode."""
        super().train(mode)
        for path in self.still:
            self.body.get_submodule(path).training = False
        return self

    def example(self) -> Inputs:
        """Return the smallest honest input: one grey image or one short caption."""
        if isinstance(self.contract, ImageContract):
            if self.contract.transform is not None:
                return self.contract.transform(Image.new("RGB", (64, 64))).unsqueeze(0)
            px = self.contract.image_px
            return torch.zeros(1, 3, px, px)
        return self.contract.pad(self.contract.encode(["a photo of a red boat"])[0])

    def finish(self, layers: int | None = None, roles: Mapping[str, str] | None = None) -> Tower:
        """Cut to the first blocks if asked, then learn the output width, the anatomy and the fingerprint."""
        self.float()  # trained tensors need fp32 masters, and a folder saved in fp16 loads as fp16
        # before the cut: a line may name blocks that fall away
        named = find_named({} if roles is None else roles, self.body, f"the {self.side} tower {self.spec!r}")
        self.roles = None if roles is None else dict(roles)
        if layers is not None:
            keep_blocks(self, layers, named)
        try:
            with torch.no_grad():
                self.anatomy = survey(self.body, lambda: self._measure(), named)
        except (RuntimeError, AttributeError, TypeError, IndexError, AssertionError) as error:
            what = f"its first {layers} blocks" if layers is not None else "an example"
            raise ValueError(
                f"the {self.side} tower {self.spec!r} does not run on {what}: {error}. Expected (B, width) or tokens; "
                f"check pool={self.pool}, layers and the input contract"
            ) from error
        self.fingerprint, self.structure = fingerprint(self.body), structure(self.body)
        return self

    def _measure(self) -> None:
        self.dim = self(self.example()).shape[-1]

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated units in depth order."""
        return [self.body.get_submodule(path) for path in self.anatomy.blocks]


vision_towers: Registry[Callable[..., Tower]] = Registry("vision tower source")
text_towers: Registry[Callable[..., Tower]] = Registry("text tower source")


def pool_tokens(tokens: Tokens, how: str) -> Tensor:
    """Pool token features (B, L, W) to (B, W), or (B, 2W) for cls+mean; padding and prefix stay out of the mean."""
    features, mask, prefix = tokens
    if how in ("cls", "cls+mean") and mask is None and prefix == 0:
        raise ValueError(f"pool={how} needs a class token and this tower has none; use pool=mean or pool=own")
    if how == "cls":
        return features[:, 0]
    if how == "token":
        if mask is None:
            return features[:, 0] if prefix else features[:, -1]
        last = mask.long().sum(1) - 1
        return features[torch.arange(len(last), device=last.device), last]
    if mask is None:
        mean = features[:, prefix:].mean(1)
    else:
        weight = mask.to(features.dtype).unsqueeze(-1)
        mean = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
    return mean if how == "mean" else torch.cat([features[:, 0], mean], dim=-1)


def keep_blocks(tower: Tower, layers: int, named: Named = NOTHING) -> None:
    """Keep the first blocks of a tower and drop the rest from their lists."""
    body = tower.body
    paths = survey(body, lambda: tower(tower.example()), named).blocks
    if not 1 <= layers <= len(paths):
        raise ValueError(f"layers={layers}: {tower.spec!r} has {len(paths)} blocks; give 1 to {len(paths)}")
    lists = [path.rpartition(".")[0] for path in paths]
    least = lists.index(lists[-1]) + 1
    if layers < least:
        stages = [lists.count(name) for name in dict.fromkeys(lists)]
        raise ValueError(
            f"layers={layers}: {tower.spec!r} has stages of {stages} blocks, and what follows them expects the last "
            f"stage's width; give {least} to {len(paths)}, or another tower"
        )
    loose = [path for path in paths[layers:] if not isinstance(body.get_submodule(path.rpartition(".")[0]), CONTAINERS)]
    if loose:
        raise ValueError(
            f"layers={layers}: the block {loose[0]!r} of {tower.spec!r} is called by name and cannot be left out; "
            "expected blocks in an nn.ModuleList or nn.Sequential; put them in one, or leave layers out"
        )
    for path in reversed(paths[layers:]):
        parent, _, name = path.rpartition(".")
        container = body.get_submodule(parent)
        if isinstance(container, nn.ModuleList):
            del container[int(name)]
        else:
            delattr(container, name)  # the others keep their names
    config = getattr(body, "config", None)
    if config is not None and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = layers


def fingerprint(body: nn.Module) -> str:
    """Return a SHA-256 over names, shapes, dtypes and bytes of the weights; to be taken before any edit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(body.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
