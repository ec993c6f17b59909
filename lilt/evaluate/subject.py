"""Who is evaluated and how: a model as it stands now, and what was already computed of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lilt import distributed
from lilt.dual import DualEncoder
from lilt.evaluate.rows import Advance, ImageRows, Rows, TextRows, at_rest, image_rows, text_rows
from lilt.model import TwoTower
from lilt.policies import merge
from lilt.towers import ImageContract, Tower, build_tower

Bar = Callable[[str, int], AbstractContextManager[Advance]]


def no_bar(name: str, total: int) -> AbstractContextManager[Advance]:
    """Show nothing."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Setting:
    """How tasks look at a model, and the data of those that name none."""

    data: str | None = None
    image_root: str | None = None
    split: str = "test"
    batch_size: int = 128
    workers: int = 0
    bar: Bar = no_bar
    # the towers as they were before training, for towers that were passed as modules; as `DualEncoder.disabled` takes
    base: Mapping[str, Any] = field(default_factory=dict)

    def alone(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Show a bar for what each process does by itself as a whole, such as fits, not a share of."""
        return self.bar(name, total * distributed.world_size())  # a move counts for all processes


class Subject:
    """A model in one state: tuned, at its base, or between. Pooled features are computed once for all tasks."""

    def __init__(self, model: DualEncoder, setting: Setting | None = None, is_base: bool = False):
        self.model = model
        self.is_base = is_base
        self.setting = setting or Setting()
        self._features: dict[tuple[str, tuple[str, ...]], Rows] = {}

    @property
    def core(self) -> TwoTower:
        """The two towers and the heads."""
        return self.model.core

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.core.parameters()).device

    @contextmanager
    def at_base(self) -> Iterator[Subject]:
        """Give the same model with its base towers for a while, with nothing known of it yet."""
        with self.model.disabled(**self.setting.base):
            yield Subject(self.model, self.setting, is_base=True)

    def between(self, scale: float) -> Subject:
        """Return a model at base + scale * (tuned - base)."""
        return Subject(self.model.interpolate(scale, **self.setting.base), self.setting)

    def bases(self) -> dict[str, tuple[Tower, torch.nn.Module | None]]:
        """Return each tower with its base body, None where its own weights are still the base's."""
        given, px = self.setting.base, self.model.config.image_px
        towers = {"vision": (given.get("preprocess"), px), "text": (given.get("tokenizer"), None)}
        found = {}
        for side, (contract, image_px) in towers.items():
            tower: Tower = getattr(self.core, side)
            found[side] = tower, merge.base_of(tower, given.get(side), contract, image_px)
        return found

    def built_anew(self, side: str) -> Tower:
        """Return the base of a tower as one of its own, from its spec or from the module that the setting has."""
        tower: Tower = getattr(self.core, side)
        given = self.setting.base.get(side)
        if given is None and tower.spec.startswith("module:"):
            raise ValueError(
                f"the {side} tower was passed as a module ({tower.spec}) and cannot be built anew; expected the module "
                f"as it was before training; pass it: Setting(base={{{side!r}: module}})"
            )
        what = tower.spec if given is None else copy.deepcopy(given)
        contract = self.setting.base.get("preprocess" if side == "vision" else "tokenizer")
        px = self.model.config.image_px if side == "vision" else None
        base = build_tower(what, side, contract, px, tower.roles)
        if base.fingerprint != tower.fingerprint:
            raise ValueError(
                f"the base of the {side} tower {tower.spec!r} has other weights than the tower was built with "
                f"(fingerprint {base.fingerprint[:12]}, expected {tower.fingerprint[:12]}); restore them"
            )
        return base

    def see(self, name: str, paths: Sequence[str], compute: ImageRows) -> Rows:
        """Open each image once and keep the rows that compute gives; name is shown beside a bar."""
        contract = self.core.vision.contract
        assert isinstance(contract, ImageContract)
        options = {"batch_size": self.setting.batch_size, "workers": self.setting.workers}
        with self.setting.bar(name, len(paths)) as advance, at_rest(self.core) as device:
            return image_rows(contract, paths, compute, device, advance=advance, **options)

    def read(self, name: str, texts: Sequence[str], compute: TextRows) -> tuple[Tensor, int]:
        """Return the rows that compute gives for texts, and how many texts were cut; name is shown beside a bar."""
        tokenizer = self.core.text.contract
        assert not isinstance(tokenizer, ImageContract)
        options = {"batch_size": self.setting.batch_size, "max_tokens": self.model.config.eval_tokens}
        with self.setting.bar(name, len(texts)) as advance, at_rest(self.core) as device:
            return text_rows(tokenizer, texts, compute, device, advance=advance, **options)  # type: ignore[arg-type]

    def features(self, side: str, name: str, items: Sequence[str]) -> Rows:
        """Return the pooled features of a tower for images or texts."""
        key = (side, tuple(items))
        if key not in self._features:
            if side == "vision":
                self._features[key] = self.see(name, items, lambda images, _: self.core.vision(images).float())
            else:
                rows, _ = self.read(name, items, lambda tokens: self.core.text(tokens).float())
                self._features[key] = Rows(torch.arange(len(items)), rows, [])
        return self._features[key]
