"""Settings that would only be noticed after minutes, or never, are errors before anything is built."""

from __future__ import annotations

from dataclasses import fields

from lilt.config import TrainConfig
from lilt.data.store import DTYPES
from lilt.losses import SAME, build_loss
from lilt.train.bill import check_price
from lilt.train.objectives import parse_objective
from lilt.train.optim import OPTIMIZERS
from lilt.train.reuse import REUSE
from lilt.train.shelf import SPILL

CHOICES: dict[str, tuple[str | None, ...]] = {
    "precision": ("no", "bf16", "fp16"),
    "optimizer": OPTIMIZERS,
    "same": SAME,
    "captions": ("one", "all"),
    "reuse": REUSE,
    "spill": SPILL,
    "reuse_dtype": (None, *DTYPES),
}


def check(config: TrainConfig) -> None:
    """Raise for settings that would only be noticed after minutes."""
    check_price(config.price)
    build_loss(config.loss)
    parse_objective(config.distill)
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name}={getattr(config, name)!r}; expected one of {', '.join(filter(None, known))}; choose one"
            )
    positive = ("epochs", "batch_size", "micro_batch", "eval_every", "log_every", "max_steps", "max_bad_steps")
    for name in (*positive, "keep_states", "views"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}; expected more than 0; give a positive number, or leave it out")
    if config.spill == "disk" and config.micro_batch is None:
        raise ValueError(
            "spill=disk came without micro_batch; expected a step in several pieces, which has something to keep; give "
            "--micro_batch, or leave it out"
        )
    plain = {f.name: f.default for f in fields(TrainConfig) if f.name.startswith("distill")}
    if config.teacher is None and (idle := [name for name in plain if getattr(config, name) != plain[name]]):
        raise ValueError(
            f"{idle[0]}={getattr(config, idle[0])} came without a teacher; expected an image model to learn from; name "
            "one with --teacher, or leave it out"
        )
