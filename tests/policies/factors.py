"""What IA3 has added to a tower."""

from __future__ import annotations

import torch

from lilt.policies.edits import Attach, Edit, Reparametrize
from lilt.policies.gain import Gain
from lilt.towers import Tower
from tests.policies.conformance import tuned


def edits_of(tower: Tower) -> list[Attach | Reparametrize]:
    edits: list[Edit] = [e for e in dict.fromkeys((tower.fates or {}).values()) if e.rule == "ia3"]
    assert edits and all(isinstance(edit, (Attach, Reparametrize)) for edit in edits)
    return edits  # type: ignore[return-value]


def gains(tower: Tower) -> dict[tuple[str, str], Gain]:
    """Return what IA3 added, by the path of its module and the tensor it multiplies."""
    found = {(edit.path, edit.claim.rpartition(".")[2]): edit.child(tower.body) for edit in edits_of(tower)}
    assert all(isinstance(child, Gain) for child in found.values())
    return found  # type: ignore[return-value]


def alive(spec: str, tower: Tower) -> Tower:
    """Apply a policy and draw its factors around one."""
    tuned(spec, tower)
    generator = torch.Generator().manual_seed(5)
    for child in gains(tower).values():
        assert (child.l == 1).all()
        child.l.data.add_(torch.randn(child.l.shape, generator=generator), alpha=0.5)
    return tower
