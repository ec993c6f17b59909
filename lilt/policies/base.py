"""A policy is data plus one verb: it plans which tensors of a tower are trained; `apply` carries the plan out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lilt.policies.edits import Edit, Open
from lilt.registry import Registry, construct, nearest, options_of, parse_call, split_top
from lilt.towers.anatomy import Leaf
from lilt.towers.base import Tower


@dataclass(frozen=True)
class Blocks:
    """A slice over the blocks of a tower in depth order, written `all`, `last:6`, `first:6`, `2:5` or `3`."""

    text: str = "all"

    @classmethod
    def parse(cls, text: str) -> Blocks:
        """Check the spelling; the numbers are checked against a tower by `of`."""
        blocks = cls(text)
        blocks.of(10**6)
        return blocks

    def of(self, count: int) -> range:
        """Return the block indices this slice selects from a tower of count blocks."""
        head, colon, tail = self.text.partition(":")
        try:
            if self.text == "all":
                return range(count)
            if head in ("last", "first"):
                n = min(int(tail), count)
                return range(count - n, count) if head == "last" else range(n)
            if colon:
                return range(count)[int(head or 0) : int(tail) if tail else None]
            at = int(head)
            return range(count)[at : at + 1 or None]  # -1 is the last block
        except ValueError:
            raise ValueError(f"blocks={self.text!r} is no slice; write all, last:6, first:6, 2:5 or 3") from None


ALL = Blocks()


@dataclass(frozen=True)
class Plan:
    """What a policy will do to a tower; nothing is changed until it is carried out."""

    edits: tuple[Edit, ...] = ()

    @property
    def trained(self) -> int:
        """How many values will be trained."""
        return sum(edit.count for edit in self.edits)

    def __add__(self, other: Plan) -> Plan:
        """Join two plans: rules that only open a parameter agree and the first keeps it, other overlap is an error."""
        taken = {edit.claim: edit for edit in self.edits}
        added = []
        for edit in other.edits:
            before = taken.get(edit.claim)
            if before is None:
                added.append(edit)
            elif not (isinstance(before, Open) and isinstance(edit, Open)):
                raise ValueError(
                    f"{before.rule} and {edit.rule} both want {edit.claim}; a weight has one policy: leave one out"
                )
        return Plan((*self.edits, *added))


@dataclass(frozen=True)
class Policy(ABC):
    """Which tensors of a tower are trained. Subclasses are frozen dataclasses registered under their name."""

    name: ClassVar[str]
    lr: ClassVar[float] = 1e-3  # default learning rate of the tensors it trains
    identity_at_start: ClassVar[bool] = True  # the tower's outputs are the pretrained ones at step 0
    mergeable: ClassVar[bool] = True  # the result is a plain tower: nothing added, or foldable into its weights
    size: ClassVar[str | None] = None  # the option that fits it to a parameter budget: more of it trains more values

    @abstractmethod
    def plan(self, tower: Tower) -> Plan:
        """Return the edits for this tower, changing nothing. Raises ValueError when nothing matches."""

    def open(self, tower: Tower, leaves: Iterable[Leaf], why: str, only: Callable[[str], bool] | None = None) -> Plan:
        """Plan to open the parameters of leaves, or those whose own name passes only."""
        edits = []
        for leaf in leaves:
            for name, tensor in leaf.module.named_parameters(recurse=False):
                if only is None or only(name):
                    path = f"{leaf.path}.{name}".lstrip(".")
                    edits.append(Open(path, tensor.numel(), self.name, why, self.lr))
        if not edits:
            raise self.nothing(tower, why)
        return Plan(tuple(edits))

    def nothing(self, tower: Tower, wanted: str) -> ValueError:
        """Return the error for a policy that matches nothing, naming what the tower has."""
        own = tower.spec.startswith(("module:", "py:"))
        hint = f" Where the guess is wrong, say what is what: {tower.side}_roles={{'**.ln*': 'norm'}}." if own else ""
        return ValueError(
            f"{self.name}: the {tower.side} tower {tower.spec!r} has no {wanted}; it has "
            f"{tower.anatomy.describe()}. Choose a policy for what is there.{hint}"
        )


policies: Registry[type[Policy]] = Registry("policy")
aliases: dict[str, tuple[str, str, str]] = {}  # name -> policy of the vision tower, of the text tower, what it is


def register(name: str) -> Callable[[type[Policy]], type[Policy]]:
    """File a policy class under its name."""

    def file(cls: type[Policy]) -> type[Policy]:
        cls.name = name
        return policies.register(name)(cls)

    return file


def parse_policy(spec: str, side: str) -> tuple[Policy, ...]:
    """Parse `lora(r=8)+layernorm` for one side; an alias stands for what it means on that side."""
    parts: list[Policy] = []
    for text in split_top(spec, "+"):
        if text in aliases:
            vision, language, _ = aliases[text]
            parts += parse_policy(vision if side == "vision" else language, side)
            continue
        call = parse_call(text)
        if call.name in aliases:
            raise ValueError(f"{call.name} is a fixed composition and takes no options; write out {aliases[call.name]}")
        if call.name not in policies:
            known = sorted([*policies.names(), *aliases])
            raise ValueError(f"unknown policy {call.name!r}; known: {', '.join(known)}.{nearest(call.name, known)}")
        parts.append(construct(policies[call.name], call, options_of(policies[call.name])))
    return tuple(parts)


def plan(parts: Iterable[Policy], tower: Tower) -> Plan:
    """Return the joint plan of several policies; two that want one weight are an error."""
    joint = Plan()
    for part in parts:
        joint = joint + part.plan(tower)
    return joint


def apply(joint: Plan, tower: Tower) -> None:
    """Freeze the whole tower, then carry out a plan. A tower takes one plan in its life.

    Afterwards tower.fates maps the name of each trained parameter of the body to the edit that trains it.
    """
    if tower.fates is not None:
        raise ValueError(
            f"the {tower.side} tower {tower.spec!r} already has a policy; it takes one: build the tower anew"
        )
    tower.requires_grad_(False)
    # held, so that no id is given again
    trained = [(parameter, edit) for edit in joint.edits for parameter in edit.carry_out(tower.body)]
    # the names of the end: what an edit puts in may rename what an earlier one has opened
    names = {id(p): name for name, p in tower.body.named_parameters() if p.requires_grad}
    fates: dict[str, Edit] = {}
    for parameter, edit in trained:
        fates.setdefault(names[id(parameter)], edit)
    assert len(fates) == len(names), "every edit returns all that it trains"
    tower.fates = fates
