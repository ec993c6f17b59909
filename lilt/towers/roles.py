"""A role map: what its owner says of a tower's parts, for what the guess by type gets wrong.

An ordered mapping from a pattern of dotted paths, as in `named_modules()`, to a role:

    {"layer*": "block", "**.rms?": "norm", "**.mix": "attention", "**.mix.wq_a": "attention.q"}

In a pattern `*`, `?` and `[12]` stand for characters within one component, and a component `**` for any number of
components, also none. A line speaks of the modules it names and of all that is inside them, where it leaves
normalisations known by their class alone. The line that names the deeper module counts; of two that name the same one,
the later. `block` lines stand apart: where there are any, the modules they name are the tower's blocks, all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from lilt.registry import nearest
from lilt.towers.anatomy import ROLES, Named, is_dense

PARTS = {"attention": ("q", "k", "v", "kv", "qkv", "out"), "mlp": ("in", "out")}
WORDS = (*(word for role in ROLES for word in (role, *(f"{role}.{p}" for p in PARTS.get(role, ())))), "block")
_SHOWN = 24  # paths in an error message


def read_roles(path: str) -> dict[str, str]:
    """Read a role map from a JSON file."""
    if not Path(path).is_file():
        raise ValueError(f"roles={path}: no such file; expected a JSON object {{path pattern: role}}; check the path")
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"roles={path} is not JSON: {error}; expected {{path pattern: role}}; mend the file") from None
    _check_words(given, f"roles={path}")
    return dict(given)


def find_named(roles: Mapping[str, str], body: nn.Module, tower: str) -> Named:
    """Find what each line of a role map names in a network; tower says whose it is, for errors.

    Raises ValueError for an unknown role, a line that names no module with parameters, a part such as attention.q on
    anything but a linear layer, and blocks that lie inside one another.
    """
    _check_words(roles, f"roles of {tower}")
    modules = {p: m for p, m in body.named_modules(remove_duplicate=False) if p and any(True for _ in m.parameters())}
    words: dict[int, str] = {}
    blocks: list[str] = []
    for pattern, word in roles.items():
        found = [path for path in modules if matches(pattern, path)]
        if not found:
            raise _nothing(pattern, body, tower)
        if word == "block":
            blocks += found
            continue
        for path in found:
            if "." in word and not _takes_part(modules[path], word):
                kind = type(modules[path]).__name__
                raise ValueError(
                    f"roles of {tower}: {pattern!r} says {word} of {path!r}, which is a {kind}; expected nn.Linear; "
                    f"write {word.partition('.')[0]} for the whole of it, or name the linear layer itself"
                )
            words[id(modules[path])] = word
    _refuse_nested(blocks, tower)
    return Named(words, frozenset(id(modules[path]) for path in blocks))


def matches(pattern: str, path: str) -> bool:
    """Say whether a pattern names a dotted path."""
    return _match(pattern.split("."), path.split("."))


def _match(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _match(pattern[1:], path[1:])


def outline(body: nn.Module) -> list[str]:
    """Return the paths of the modules that own parameters as patterns: numbers are `*`, and each is named once."""
    owners = (path for path, m in body.named_modules() if path and any(True for _ in m.parameters(recurse=False)))
    return list(dict.fromkeys(_numberless(path) for path in owners))


def _numberless(path: str) -> str:
    return ".".join("*" if name.isdigit() else name for name in path.split("."))


def _check_words(roles: object, where: str) -> None:
    if not isinstance(roles, Mapping):
        raise ValueError(
            f"{where}: got {type(roles).__name__}; expected a mapping {{path pattern: role}}; write for example "
            "{'**.rms': 'norm'}, or name a JSON file in the spec with ?roles=FILE"
        )
    for pattern, word in roles.items():
        if word not in WORDS:
            known = ", ".join(WORDS)
            raise ValueError(
                f"{where}: unknown role {word!r} for {pattern!r}; known: {known}.{nearest(str(word), WORDS)}"
            )


def _takes_part(module: nn.Module, word: str) -> bool:
    return is_dense(module) or (word == "attention.qkv" and isinstance(module, nn.MultiheadAttention))


def _nothing(pattern: str, body: nn.Module, tower: str) -> ValueError:
    for path, _ in body.named_parameters():
        if matches(pattern, path):
            owner = path.rpartition(".")[0]
            advice = f"name its module, {owner!r}" if owner else "bare parameters of the whole model keep their guess"
            return ValueError(f"roles of {tower}: {pattern!r} is the parameter {path!r}; expected a module; {advice}")
    paths = outline(body)
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    close = nearest(pattern, [*paths, *dict.fromkeys(_numberless(path) for path, _ in body.named_modules() if path)])
    return ValueError(
        f"roles of {tower}: {pattern!r} names no module with parameters; it has {', '.join(paths[:_SHOWN])}{more}; "
        f"write * for a component or a part of one, ** for any number of them.{close}"
    )


def _refuse_nested(blocks: list[str], tower: str) -> None:
    for outer in blocks:
        inner = next((path for path in blocks if path.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(
                f"roles of {tower}: both {outer!r} and {inner!r} inside it are named block; expected blocks beside one "
                "another; name only one level"
            )
