"""A question about towers, as a user asks it."""

from __future__ import annotations

from dataclasses import dataclass

from lilt.policies import parse_policy


@dataclass(frozen=True)
class Question:
    """Towers to choose from, the pairs to look at, and the training that is planned; 0 and None: nothing said.

    text_tokens: captions are cut there, and the step is predicted for captions of that length. batch_size: pairs that
    are run at a time, and those of the step.
    """

    vision: tuple[str, ...] = ("demo",)
    text: tuple[str, ...] = ("demo",)
    data: str = "demo"
    image_root: str | None = None
    split: str = "train"
    pairs: int = 0
    k: int = 10
    layers: str = "all"
    policy: str = "layernorm"
    image_px: int = 0
    text_tokens: int = 32
    batch_size: int = 64
    workers: int = 0

    def check(self) -> None:
        """Raise ValueError for what cannot be meant, before anything is read."""
        for name in ("k", "text_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected more than 0; give a positive whole number")
        for name in ("pairs", "image_px", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more; leave it out")
        if self.layers not in ("all", "last"):
            raise ValueError(f"layers={self.layers!r}; expected all, or last for the outputs alone; choose one")
        if self.pairs:
            self.check_enough(self.pairs, "--pairs")
        parse_policy(self.policy, "vision"), parse_policy(self.policy, "text")

    def check_enough(self, found: int, where: str) -> None:
        """Raise ValueError for so few pairs that each would have every other as a neighbour."""
        if found < self.k + 2:
            raise ValueError(
                f"{where}: {found} pairs are too few for k={self.k} neighbours; expected at least {self.k + 2} images "
                "with a caption of their own, better some hundred; give more, or a smaller --k"
            )
