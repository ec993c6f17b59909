"""The losses by name, as a user writes them: `softmax(smoothing=0.1,chunk=4096)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from lilt.losses.hinge import chunked_hinge, hinge_ranking
from lilt.losses.relation import Relation
from lilt.losses.sigmoid import chunked_sigmoid, sigmoid_contrastive
from lilt.losses.softmax import chunked_softmax, softmax_contrastive
from lilt.losses.tiles import check_chunk
from lilt.registry import Registry, construct, options_of, parse_call

Result = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A comparison of gathered embeddings image and text (G, D), unit rows; `rows` are the B that are ours.

    Returns a scalar, whose mean over ranks is the loss of the joint batch, and its parts, detached.
    chunk: none keeps the whole (B, G) matrix of logits, which is fastest while it fits; a number computes at most
    about chunk x chunk of them at a time, and again in the backward pass: the same gradient in linear memory.
    A loss without scale_start uses no scale, one without bias_start no bias; what it does not use must not be trained.
    """

    chunk: int | None = None
    full: ClassVar[Callable[..., Result]]  # of matrices (B, G)
    tiled: ClassVar[Callable[..., Result]]  # of the relation, chunk by chunk
    scale_start: ClassVar[float | None] = None
    bias_start: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_chunk(self.chunk)

    @property
    def needs_scale(self) -> bool:
        """Say whether cosines are multiplied with a learned scale."""
        return self.scale_start is not None

    @property
    def needs_bias(self) -> bool:
        """Say whether a learned bias is added to the logits."""
        return self.bias_start is not None

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        rows: slice,
        relation: Relation,
    ) -> Result:
        """Return the loss of our rows and its parts."""
        name = type(self).__name__.lower()
        numbers = [given(scale, "scale", name)] if self.needs_scale else []
        numbers += [given(bias, "bias", name)] if self.needs_bias else []
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "chunk"}
        if self.chunk is None:
            facts = matrices(relation, rows, len(image))
            return self.full(image, text, *numbers, rows=rows, **facts, **options)
        return self.tiled(image, text, *numbers, rows=rows, relation=relation, chunk=self.chunk, **options)


losses: Registry[type[Loss]] = Registry("loss")


@losses.register("softmax")
@dataclass(frozen=True, kw_only=True)
class Softmax(Loss):
    """Symmetric InfoNCE, as CLIP: one right answer among all, in both directions.

    smoothing: share of the target spread evenly over all pairs that take part.
    """

    smoothing: float = 0.0
    full = staticmethod(softmax_contrastive)
    tiled = staticmethod(chunked_softmax)
    scale_start: ClassVar[float | None] = 1 / 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing("softmax", self.smoothing)


@losses.register("sigmoid")
@dataclass(frozen=True, kw_only=True)
class Sigmoid(Loss):
    """Binary cross-entropy of each pair alone, as SigLIP, with a learned bias.

    smoothing: share of each answer that is spread evenly over yes and no.
    """

    smoothing: float = 0.0
    full = staticmethod(sigmoid_contrastive)
    tiled = staticmethod(chunked_sigmoid)
    scale_start: ClassVar[float | None] = 10.0
    bias_start: ClassVar[float | None] = -10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing("sigmoid", self.smoothing)


@losses.register("hinge")
@dataclass(frozen=True, kw_only=True)
class Hinge(Loss):
    """Ranking by a margin on cosines, without a scale: against all negatives or the hardest of each row."""

    margin: float = 0.2
    hardest: bool = False
    full = staticmethod(hinge_ranking)
    tiled = staticmethod(chunked_hinge)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.margin <= 2:
            raise ValueError(
                f"hinge: margin={self.margin}; expected a distance of cosines, above 0 and at most 2; give 0.2"
            )


def check_smoothing(loss: str, share: float) -> None:
    """Raise ValueError for what is no share of a target."""
    if not 0 <= share < 1:
        raise ValueError(f"{loss}: smoothing={share}; expected a share of the target, at least 0 and below 1; give 0.1")


def given(value: Tensor | None, name: str, loss: str) -> Tensor:
    """Return a scalar that a loss cannot do without."""
    if value is None:
        raise ValueError(f"{loss} came without a {name}; expected a learned scalar; pass the model's {name}")
    return value


def matrices(relation: Relation, rows: slice, total: int) -> dict[str, Tensor | None]:
    """Return what the full forms ask for."""
    relation.check(total)
    positives, ignored = relation.relate(rows, slice(0, total))
    return {"positives": positives, "ignored": ignored, "valid": relation.valid}


def build_loss(spec: str) -> Loss:
    """Build a loss from `softmax(smoothing=0.1)`, `sigmoid(chunk=4096)` or `hinge(margin=0.2,hardest=true)`."""
    call = parse_call(spec)
    cls = losses[call.name]
    options = options_of(cls)
    options["chunk"] = options.pop("chunk")  # a loss's own options first
    return construct(cls, call, options)
