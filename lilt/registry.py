"""Names for components, and the little grammar in which a user writes them: `lora(r=8,targets=q|v)+layernorm`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """A named family of components; the only list of its members."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files a component under a name; a name is given once."""

        def file(item: T) -> T:
            assert name not in self._items, f"{self.kind} {name!r} is registered twice"
            self._items[name] = item
            return item

        return file

    def names(self) -> list[str]:
        """Return the known names, sorted."""
        return sorted(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            known = ", ".join(self.names())
            raise ValueError(f"unknown {self.kind} {name!r}; known: {known}.{nearest(name, self._items)}")
        return self._items[name]


@dataclass(frozen=True)
class Call:
    """One parsed `name(a,key=b)`; values are still text."""

    name: str
    args: tuple[str, ...] = ()
    kwargs: dict[str, str] = field(default_factory=dict)


def split_top(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside all parentheses; parts are stripped."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += {"(": 1, ")": -1}.get(char, 0)
        if depth < 0:
            break
        if char == separator and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    if depth != 0:
        raise ValueError(f"unbalanced parentheses in {text!r}; expected name(key=value); close each bracket once")
    return [*parts, current.strip()]


def parse_call(text: str) -> Call:
    """Parse `name`, `name(3)` or `name(key=value,…)`."""
    name, bracket, rest = text.strip().partition("(")
    if not name or (bracket and not rest.endswith(")")) or ")" in name:
        raise ValueError(f"cannot read {text!r}; expected name or name(key=value,…); check the brackets")
    args: list[str] = []
    kwargs: dict[str, str] = {}
    for part in split_top(rest[:-1], ",") if rest[:-1].strip() else []:
        key, equals, value = part.partition("=")
        if equals and "(" not in key:  # the = of a nested call is its own
            kwargs[key.strip()] = value.strip()
        elif kwargs:
            raise ValueError(
                f"in {text!r} the plain value {part!r} follows a key=value; write {part!r} first, or where the comma "
                "belongs to the value before it, give that value in a file, if its option reads one"
            )
        else:
            args.append(part)
    return Call(name.strip(), tuple(args), kwargs)


def coerce(text: str, kind: Any, where: str) -> Any:
    """Turn a written value into the annotated type (bool, int, float, str, X | None, or a class with `parse`)."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if text.lower() in ("none", "null"):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{where}={text} is not a truth value; write true or false")
    if hasattr(kind, "parse"):
        return kind.parse(text)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{where}={text} is not of type {kind.__name__}; write a {kind.__name__}") from None


def construct(cls: Callable[..., T], call: Call, fields: dict[str, Any]) -> T:
    """Build a component from a parsed call; fields maps each allowed key, in order, to its type."""
    if len(call.args) > len(fields):
        raise ValueError(f"{call.name} takes {len(fields)} values ({', '.join(fields)}), not {len(call.args)}")
    given = dict(zip(fields, call.args, strict=False))
    for key, value in call.kwargs.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"{call.name} has no option {key!r}; it takes: {known}.{nearest(key, fields)}")
        if key in given:
            raise ValueError(f"{call.name} got {key!r} twice; give it once")
        given[key] = value
    return cls(**{key: coerce(value, fields[key], f"{call.name}: {key}") for key, value in given.items()})


def options_of(cls: type) -> dict[str, Any]:
    """Return the options of a dataclass: each instance field with its resolved type, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
