"""Numbers to read a result against, which a data set may bring along: ceilings, published scores."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "references.json"


def read_references(manifest: str | Path, split: str) -> dict[str, float]:
    """Return {name: percent} for a split from `references.json` beside the manifest; without that file, nothing.

    Raises ValueError when the file is there and is not {split: {name: number}}.
    """
    file = Path(manifest).parent / FILE
    if not file.is_file():
        return {}
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in given.get(split, {}).items()}
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}; expected {{split: {{name: number}}}}; mend or remove the file") from None
