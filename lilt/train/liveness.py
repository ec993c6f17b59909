"""The second proof of life, by the first two steps: every trained tensor has a gradient, and one that is not zero.

The first proof (`lilt.policies.liveness`) asks whether a tensor can move the output. This one sees what that cannot: a
forward that is another in training mode, and frozen zeros in front of a tensor.
"""

from __future__ import annotations

from typing import Any

from lilt import distributed
from lilt.model import TwoTower
from lilt.policies.liveness import dead_by_nature, listed, read_gradients


class FirstSteps:
    """Looks at the gradients until two steps have counted, then costs nothing.

    A step counts if its gradients are finite (fp16 begins with steps that are skipped) and its learning rates are above
    zero: the A of LoRA has no gradient before B has moved. Where a gain of zero stands before B, B moves one step
    later, and so there is one step more.
    """

    def __init__(self, core: TwoTower, done: int):
        self.core = core
        self.left = 2 if done < 2 else 0  # a run that goes on has been looked at
        sides = (("vision", core.vision), ("text", core.text))
        by_nature = {f"{side}.body.{name}" for side, tower in sides for name in dead_by_nature(tower)}
        self.silent = core.trained().keys() - by_nature

    def look(self, optimizer: Any) -> None:
        """Look at the gradients of a step before the optimizer uses them.

        Raises ValueError, on all ranks alike, naming the tensors that have none, or zeros in both steps.
        """
        if not self.left:
            return
        trained = {name: p for name, p in self.core.trained().items() if p.numel()}
        everybody = distributed.gather_objects(read_gradients(trained))
        missing = set.intersection(*(found.missing for found in everybody))
        if missing:
            raise _missing([name for name in trained if name in missing])
        resting = any(group["lr"] == 0 < group.get("initial_lr", 0) for group in optimizer.param_groups)
        if resting or not all(found.finite for found in everybody):
            return
        # sharded by a launcher, a tensor lives where any rank's share of it does
        silent = self.silent & set.intersection(*(found.missing | found.zero for found in everybody))
        woken, self.silent = self.silent - silent, silent
        self.left -= 1
        if self.left or not silent:
            return
        zeros = {name for name, p in trained.items() if name in woken and not distributed.ours(p).any()}
        if not set.intersection(*distributed.gather_objects(zeros)):
            raise _silent([name for name in trained if name in silent], len(trained))
        self.left = 1


def _missing(names: list[str]) -> ValueError:
    return ValueError(
        f"the first step left {listed(names)} without a gradient; expected one for every trained tensor: in training "
        "mode the loss does not depend on them, or the tower cuts the gradient off (detach, no_grad, reentrant "
        "checkpointing behind a frozen layer). Mend the tower, or choose a policy, roles or blocks without them"
    )


def _silent(names: list[str], trained: int) -> ValueError:
    said = f"the gradient of {listed(names)} was zero in each of the first steps; "
    if len(names) == trained:
        return ValueError(
            f"{said}that is all there is to train, so the loss is flat; expected batches of pairs that differ: raise "
            "--batch_size, or look at the data"
        )
    return ValueError(
        f"{said}expected every trained tensor to learn: a frozen zero stands in front of them, such as the gain of a "
        "residual branch that was never pretrained. Give the tower pretrained weights, train the gains too "
        "(+layernorm), or choose a policy, roles or blocks without them"
    )
