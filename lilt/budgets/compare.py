"""The comparison: every policy on one pair of towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lilt.budgets.cost import meta_batch, step_cost
from lilt.budgets.counter import Counter
from lilt.budgets.fit import fit
from lilt.budgets.limits import Limit
from lilt.budgets.row import Budget, budget
from lilt.model import Scale, TwoTower, build_heads
from lilt.policies import Plan, aliases, apply, parse_policy, plan, policies
from lilt.policies.edits import Open
from lilt.towers import Tower
from lilt.towers.meta import without_weights


@dataclass(frozen=True)
class Comparison:
    """The budgets that could be computed, the reasons of the policies these towers cannot take, and what it was for."""

    rows: list[Budget]
    refused: dict[str, str]
    about: str


def default_specs() -> list[str]:
    """Return every registered policy and alias, with its default options."""
    return [*policies.names(), *aliases]


def compare(
    vision: Tower,
    text: Tower,
    specs: Sequence[str],
    *,
    batch_size: int = 64,
    text_tokens: int = 32,
    projection: str = "linear(dim=256)",
    shared: str = "none",
    trainable: Limit | None = None,
    advance: Callable[[str], None] = lambda spec: None,
) -> Comparison:
    """Compute the budgets of policies on two towers that have none yet; the towers stay as they are.

    trainable: fit ranks and widths to this limit, the same in both towers, and no wider than the wider tower. advance
    is called with each spec before it is computed. Raises ValueError for a spec that cannot be read.
    """
    for spec in specs:
        parse_policy(spec, "vision"), parse_policy(spec, "text")
    batch = meta_batch(vision, text, batch_size, text_tokens)
    pair = BarePair(without_weights(vision), without_weights(text), projection, shared, *batch)
    advance("full")
    whole = pair.tuned("full")
    full = step_cost(whole, pair.images, pair.tokens, pair.counter)
    rows, refused = [], {}
    for spec in dict.fromkeys(specs):
        advance(spec)
        try:
            chosen = spec if trainable is None else pair.fitted(spec, trainable)
            tuned = pair.tuned(chosen)
        except ValueError as error:
            refused[spec] = str(error).removeprefix(f"{spec}: ")
            continue
        rows.append(budget(chosen, tuned, step_cost(tuned, pair.images, pair.tokens, pair.counter), full))
    return Comparison(rows, refused, pair.about())


@dataclass(frozen=True)
class BarePair:
    """Two towers without a policy, and the batch they are compared on."""

    vision: Tower
    text: Tower
    projection: str
    shared: str
    images: Tensor
    tokens: dict[str, Tensor]
    counter: Counter = field(default_factory=Counter)

    @property
    def width(self) -> int:
        """The width of the wider tower."""
        return max(max(tower.dim, tower.anatomy.token_width or 0) for tower in (self.vision, self.text))

    def plans(self, spec: str, towers: Sequence[Tower] = ()) -> list[Plan]:
        """Return what a policy does to each tower. Raises ValueError for one that they cannot take."""
        with self.counter:  # some policies try a tower out
            return [plan(parse_policy(spec, tower.side), tower) for tower in towers or (self.vision, self.text)]

    def join(self, vision: Tower, text: Tower) -> TwoTower:
        """Put the heads on."""
        with self.counter, torch.device("meta"):  # heads that read tokens try the towers out
            shared, projection = build_heads(self.shared, self.projection, vision, text)
            return TwoTower(vision, text, projection, Scale(), shared)

    def tuned(self, spec: str) -> TwoTower:
        """Return a model of copies of the towers with a policy applied."""
        vision, text = without_weights(self.vision), without_weights(self.text)
        # planned on the copies: what is added may hold on to the modules it was planned for
        plans = self.plans(spec, (vision, text))
        with torch.device("meta"):
            for joint, tower in zip(plans, (vision, text), strict=True):
                apply(joint, tower)
        return self.join(vision, text)

    def fitted(self, spec: str, limit: Limit) -> str:
        """Return a spec with the largest size that a limit allows. Raises ValueError for one that they cannot take."""
        self.plans(spec)  # refused for what it is, not for a size
        return fit(spec, partial(self.within, limit), self.width)

    def within(self, limit: Limit, spec: str) -> bool:
        """Say whether a spec trains no more than a limit allows; a size that a tower cannot take is too large."""
        try:
            edits = [edit for joint in self.plans(spec) for edit in joint.edits]
        except ValueError:
            return False
        bare = self.join(self.vision, self.text)
        heads = sum(p.numel() for part in (bare.shared, bare.projection, bare.scale) for p in part.parameters())
        trained = heads + sum(edit.count for edit in edits)
        added = sum(edit.count for edit in edits if not isinstance(edit, Open))
        total = sum(p.numel() for p in bare.parameters()) + added
        return (100 * trained / total if limit.key == "percent" else trained) <= limit.most

    def about(self) -> str:
        """Say in one line what the numbers hold for."""
        pairs, _, height, width = self.images.shape
        length = self.tokens["input_ids"].shape[1]
        joint = self.projection if self.shared == "none" else f"{self.shared}, {self.projection}"
        sizes = [sum(p.numel() for p in tower.parameters()) for tower in (self.vision, self.text)]
        return (
            f"{self.vision.spec} ({sizes[0]:,} values, {height}x{width} px) and {self.text.spec} ({sizes[1]:,} values, "
            f"{length} tokens), batch of {pairs}, {joint}; no weights were read"
        )
