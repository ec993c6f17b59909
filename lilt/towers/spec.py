"""Tower specs: `timm:NAME`, `hf:NAME_OR_PATH`, `open_clip:ARCH@TAG`, `py:package.module:function`, with `?options`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from urllib.parse import parse_qsl

from lilt.registry import coerce, nearest
from lilt.towers.roles import read_roles

POOLS = ("own", "cls", "mean", "cls+mean", "token")


def expand(path: str) -> str:
    """Fill in `~` and environment variables; an unset variable is an error that names it."""
    filled = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 (specs are not only paths)
    missing = re.search(r"\$\{?(\w+)", filled)
    if missing:
        name = missing[1]
        raise ValueError(
            f"{path!r} needs the environment variable {name}, which is not set; set {name}=… and run again"
        )
    return filled


@dataclass(frozen=True)
class TowerSpec:
    """One parsed tower spec; `extra` holds the options that go to the library as they are."""

    source: str
    name: str = ""
    weights: str | None = None
    layers: int | None = None
    pool: str | None = None
    pretrained: bool = True
    image_px: int | None = None
    extra: dict[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] | None = None

    @classmethod
    def parse(cls, text: str, image_px: int | None = None, roles: Mapping[str, str] | None = None) -> TowerSpec:
        """Parse a spec; image_px is used where the spec itself names none, roles instead of the file it names."""
        head, _, query = expand(text).partition("?")
        source, _, name = head.partition(":")
        known = {f.name: f for f in fields(cls) if f.name not in ("source", "name", "extra")}
        types = {"layers": int, "image_px": int, "pretrained": bool}
        options: dict[str, object] = {}
        extra: dict[str, str] = {}
        # "+" is a space in a web query, here it is itself: pool=cls+mean
        for key, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):
            if key == "roles":
                roles = read_roles(value) if roles is None else roles
            elif key in known:
                options[key] = coerce(value, types.get(key, str), f"{text}: {key}")
            else:
                extra[key] = value
        spec = cls(source, name, extra=extra, **options)  # type: ignore[arg-type]
        if spec.pool is not None and spec.pool not in POOLS:
            raise ValueError(
                f"{text}: unknown pool {spec.pool!r}; known: {', '.join(POOLS)}.{nearest(spec.pool, POOLS)}"
            )
        return replace(spec, image_px=spec.image_px or image_px, roles=roles)

    def refuse_extra(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise for an option that nobody would read."""
        known = [f.name for f in fields(self) if f.name not in ("source", "name", "extra")] + list(allowed)
        for key in self.extra:
            if key not in allowed:
                raise ValueError(
                    f"tower {self.source}:{self.name} has no option {key!r}; it takes: {', '.join(known)}."
                    f"{nearest(key, known)}"
                )
