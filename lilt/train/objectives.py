"""What a student can learn from a teacher of images; the list of distillation objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lilt.losses import distill as losses
from lilt.model import Scale
from lilt.registry import Registry, construct, options_of, parse_call
from lilt.train.bank import Bank

HOTTEST, COLDEST = 1.0, 0.01  # range of a learned temperature


class Target(NamedTuple):
    """What a student is compared with: teacher (G, T) of all ranks, whose images (G,), which rows are real (G,), ours.

    scale: a learned 1 / temperature; memory: candidates from earlier batches; for the objectives that made them.
    """

    teacher: Tensor
    rows: slice
    image_id: Tensor
    valid: Tensor
    scale: Tensor | None = None
    memory: losses.Memory | None = None


@dataclass(frozen=True)
class Distillation(ABC):
    """What a student learns from a teacher. Subclasses are frozen dataclasses registered under their name."""

    needs: ClassVar[str] = "features"  # of the teacher: features or logits
    normalises: ClassVar[bool] = False  # compares unit rows
    gathers: ClassVar[bool] = False  # compares the student's rows of all ranks

    @abstractmethod
    def __call__(self, student: Tensor, target: Target) -> Tensor:
        """Return the distance of one modality's rows, (B, T) or where it gathers (G, T), from their target."""

    def make_scale(self) -> Scale | None:
        """Return the learned factor on cosines, None where nothing is learned."""
        return None

    def make_bank(self, width: int, batch_size: int, pairs: int | None) -> Bank | None:
        """Return the memory it needs, None where it needs none."""
        return None

    @property
    def learns_temperature(self) -> bool:
        """Say whether the temperature is trained."""
        return False


objectives: Registry[type[Distillation]] = Registry("distillation objective")


def parse_objective(spec: str) -> Distillation:
    """Build an objective from `contrastive(temperature=0.07,learn=true,bank=4096)`."""
    call = parse_call(spec)
    return construct(objectives[call.name], call, options_of(objectives[call.name]))


@objectives.register("contrastive")
@dataclass(frozen=True)
class Contrastive(Distillation):
    """Find the own teacher row among those of the batch and of a bank with earlier ones; bank=0: none."""

    temperature: float = 0.07
    learn: bool = False
    bank: int = 65536
    normalises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("contrastive", self.temperature)
        if self.learn and not COLDEST <= self.temperature <= HOTTEST:
            raise ValueError(
                f"contrastive: temperature={self.temperature} is to be learned; expected a start in [{COLDEST}, "
                f"{HOTTEST}], the range it is kept in; give 0.07, or learn=false"
            )
        if self.bank < 0:
            raise ValueError(f"contrastive: bank={self.bank}; expected 0 or more rows; give bank=0 for none")

    def __call__(self, student: Tensor, target: Target) -> Tensor:
        teacher, rows, image_id, valid, scale, memory = target
        factor = 1 / self.temperature if scale is None else scale
        known: dict[str, Any] = {"rows": rows, "image_id": image_id, "valid": valid, "memory": memory}
        return losses.contrastive_target(student, teacher, factor, **known)

    @property
    def learns_temperature(self) -> bool:
        return self.learn

    def make_scale(self) -> Scale | None:
        return Scale(1 / self.temperature, 1 / HOTTEST, 1 / COLDEST) if self.learn else None

    def make_bank(self, width: int, batch_size: int, pairs: int | None) -> Bank | None:
        return Bank(self.bank, width, batch_size, pairs) if self.bank else None


@objectives.register("mse")
@dataclass(frozen=True)
class MSE(Distillation):
    """Come near the own teacher row: half of the squared distance, averaged over its width."""

    def __call__(self, student: Tensor, target: Target) -> Tensor:
        return losses.mse(student, target.teacher, rows=target.rows, valid=target.valid)


@objectives.register("cosine")
@dataclass(frozen=True)
class Cosine(Distillation):
    """Point where the own teacher row points."""

    def __call__(self, student: Tensor, target: Target) -> Tensor:
        return losses.cosine(student, target.teacher, rows=target.rows, valid=target.valid)


@objectives.register("kl")
@dataclass(frozen=True)
class KL(Distillation):
    """See the classes that a supervised teacher sees."""

    temperature: float = 1.0
    needs: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        _positive("kl", self.temperature)

    def __call__(self, student: Tensor, target: Target) -> Tensor:
        known: dict[str, Any] = {"rows": target.rows, "valid": target.valid, "temperature": self.temperature}
        return losses.kl(student, target.teacher, **known)


@objectives.register("relational")
@dataclass(frozen=True)
class Relational(Distillation):
    """Find the rows of a batch as much alike as the teacher finds their images."""

    temperature: float = 0.1
    normalises: ClassVar[bool] = True
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("relational", self.temperature)

    def __call__(self, student: Tensor, target: Target) -> Tensor:
        known: dict[str, Any] = {"rows": target.rows, "valid": target.valid, "temperature": self.temperature}
        return losses.relational(student, target.teacher, **known)


def _positive(name: str, temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name}: temperature={temperature}; expected more than 0; leave it out for the default")
