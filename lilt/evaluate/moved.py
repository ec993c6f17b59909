"""Which weights moved most: the relative change of each layer and role."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Task, Values, register
from lilt.policies import Policy, merge, parse_policy
from lilt.policies.edits import Open
from lilt.towers import Tower


@register("moved")
@dataclass(frozen=True)
class Moved(Task):
    """Say by how much weights changed, |tuned - base| / |base| of each block and role in percent, the largest first.

    What a policy adds is folded into the weights before they are compared; what cannot be folded is counted alone.
    """

    def measure(self, subject: Subject) -> Values:
        config = subject.model.config
        for side, (tower, base) in subject.bases().items():
            found = changes(tower, base, parse_policy(config.policies[side], side))
            ordered = sorted(found.items(), key=lambda item: -item[1])
            yield from ((f"{side}/{place}", 100 * value) for place, value in ordered)
            added = (name for name, edit in (tower.fates or {}).items() if not isinstance(edit, Open))
            yield f"num_{side}_added", sum(tower.body.get_parameter(name).numel() for name in added)


def changes(tower: Tower, base: nn.Module | None, policy: tuple[Policy, ...]) -> dict[str, float]:
    """Return the relative L2 change of the weights of each block and role in which any changed."""
    places = {leaf.path: (leaf.block, leaf.role) for leaf in tower.anatomy.leaves}
    sums: dict[str, list[float]] = {}
    for name, before, after in _weights(tower, base, policy):
        block, role = places[name.rpartition(".")[0]]
        total = sums.setdefault(role if block is None else f"block {block}/{role}", [0.0, 0.0])
        before, after = before.detach().double().cpu(), after.detach().double().cpu()
        total[0] += float((after - before).square().sum())
        total[1] += float(before.square().sum())
    # where all weights start at zero, all that is there now is new
    return {place: math.sqrt(moved / size) if size else 1.0 for place, (moved, size) in sums.items() if moved > 0}


def _weights(tower: Tower, base: nn.Module | None, policy: tuple[Policy, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the library's name of each weight with its values before and after."""
    if all(part.mergeable for part in policy):
        start = copy.deepcopy(tower, {id(tower.contract): tower.contract})
        merge.interpolate(start, base, 0)
        before: dict[str, Tensor] = dict(merge.merged(start, policy).body.named_parameters())
        after: dict[str, Tensor] = dict(merge.merged(tower, policy).body.named_parameters())
    else:
        before = {} if base is None else dict(base.named_parameters())
        after = {edit.path: tower.body.get_parameter(name) for name, edit in merge.changed(tower).items()}
    yield from ((name, value, after.get(name, value)) for name, value in before.items())
