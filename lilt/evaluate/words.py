"""The words of zero-shot classification: class names, matched to labels, and prompt templates."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilt.evaluate.labelled import Entry, Label, check_range, number_labels
from lilt.registry import nearest
from lilt.towers import expand
from lilt.towers.templates import imagenet_classes, imagenet_templates

SINGLE = "a photo of a {}."
TEMPLATES = {"openai80": imagenet_templates}
CLASSES = {"imagenet": imagenet_classes}
PLACES = ("{}", "{c}")


def read_templates(given: str) -> tuple[str, ...]:
    """Return the templates of `openai80`, of one such as `a photo of a {}.`, or of a file with one a line."""
    if given in TEMPLATES:
        return TEMPLATES[given]()
    if any(place in given for place in PLACES):
        return (given,)
    found = _read(given, "templates", f"{', '.join(TEMPLATES)}, a text with {{}} in it, or a file with one a line")
    if not isinstance(found, list):
        raise ValueError(f"templates={given}: expected a list of texts with {{}} in each; write one template a line")
    for number, template in enumerate(found, 1):
        if not any(place in template for place in PLACES):
            raise ValueError(
                f"templates={given} line {number}: {template!r} has no place for the class name; expected {{}} in it; "
                "put it where the name goes"
            )
    return tuple(found)


def fill(template: str, name: str) -> str:
    """Put a class name into a template."""
    # no str.format: a name or a template may have braces of its own
    return re.sub(r"\{c?\}", lambda _: name, template)


def read_classes(given: str | None) -> list[str] | dict[str, str] | None:
    """Return the class names of `imagenet` or of a file: one a line, a JSON list, or a JSON object {label: name}."""
    if given is None:
        return None
    if given in CLASSES:
        return list(CLASSES[given]())
    return _read(given, "classes", f"{', '.join(CLASSES)}, or a file with one name a line, in the order of the labels")


def match_names(
    entries: Sequence[Entry], names: list[str] | dict[str, str] | None, source: str
) -> tuple[list[str], dict[Label, int]]:
    """Return the class names and which of them is each label's.

    Names by label fit by themselves. In a list, numbers count from 0; labels that are names themselves are found, in
    whatever case and with _, - or a space between words; where none is a name, such as WordNet ids, they take the names
    in their own sorted order and must be as many.
    Raises ValueError for a label without a name, also where others have one: their order says nothing then.
    """
    labels = number_labels(entries)
    if names is None:
        return _own_names(entries, labels, source)
    if isinstance(names, dict):
        lacking = [label for label in labels if str(label) not in names]
        if lacking:
            raise ValueError(
                f"{source}: {len(lacking)} of {len(labels)} labels have no class name (first: {lacking[0]!r}); the "
                f"classes file has {len(names)}; add them.{nearest(str(lacking[0]), names)}"
            )
        return list(names.values()), {label: list(names).index(str(label)) for label in labels}
    if isinstance(next(iter(labels)), int):
        check_range(entries, len(names), "the classes file")
        return names, {label: int(label) for label in labels}
    found = _by_name([str(label) for label in labels], names)
    if lacking := [str(label) for label in labels if label not in found] if found else []:
        shown = ", ".join(map(repr, lacking[:8])) + (f" and {len(lacking) - 8} more" if len(lacking) > 8 else "")
        raise ValueError(
            f"{source}: {len(lacking)} of {len(labels)} labels {'has' if len(lacking) == 1 else 'have'} no class name "
            f"({shown}); the classes file has {len(names)} names, and {len(found)} labels are among them; expected all "
            f"or none; mend the spelling, or give a JSON file {{label: name}}.{nearest(lacking[0], names)}"
        )
    if found:
        return names, dict(found)
    if len(labels) != len(names):
        raise ValueError(
            f"{source} has {len(labels)} labels ({next(iter(labels))!r}, …) and the classes file {len(names)} names; "
            "expected as many; complete one of them, or give a JSON file {label: name}"
        )
    return names, labels


def _by_name(labels: Sequence[str], names: Sequence[str]) -> dict[Label, int]:
    """Return the place of each label that is a name: as it is spelled, else the only one that is the same but for case
    and what stands between words."""
    exact, folded = {name: place for place, name in reversed(list(enumerate(names)))}, list(map(_folded, names))
    spellings, asked = Counter(folded), Counter(map(_folded, labels))
    only = {key: place for place, key in enumerate(folded) if spellings[key] == 1}
    found: dict[Label, int] = {}
    for label in labels:
        key = _folded(label)
        if label in exact:
            found[label] = exact[label]
        elif key in only and asked[key] == 1:  # of two spellings nobody knows which is meant
            found[label] = only[key]
    return found


def _folded(name: str) -> str:
    return re.sub(r"[_\-\s]+", " ", name).strip().casefold()


def _own_names(entries: Sequence[Entry], labels: dict[Label, int], source: str) -> tuple[list[str], dict[Label, int]]:
    if isinstance(entries[0].label, int):
        raise ValueError(
            f"{source} numbers its classes ({entries[0].where}: {entries[0].label}) and class names are missing; "
            "expected a file with one name a line; give classes=FILE"
        )
    return [str(label).replace("_", " ") for label in labels], labels


def _read(given: str, option: str, expected: str) -> Any:
    file = Path(expand(given))
    if not file.is_file():
        raise ValueError(f"{option}={given}: no such file; expected {expected}; check the path")
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{option}={given} line {error.lineno}: not JSON ({error.msg}); mend the file") from None
        values = list(found.values()) if isinstance(found, Mapping) else found
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{option}={given}: expected a list of texts or an object {{label: text}}; mend the file")
    else:
        found = values = text.removesuffix("\n").split("\n")
    empty = next((number for number, value in enumerate(values, 1) if not value.strip()), None)
    if empty is not None or not values:
        raise ValueError(f"{option}={given} line {empty or 1} is empty; expected {expected}; fill or remove it")
    return dict(found) if isinstance(found, Mapping) else [value.strip() for value in values]
