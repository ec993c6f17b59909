"""The list of policies for people: CLI and README read it from the registry."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lilt.policies.base import aliases, policies


def catalogue() -> list[dict[str, Any]]:
    """Return one row a policy: its spec with all defaults, what it trains, and what it declares."""
    rows: list[dict[str, Any]] = []
    for name in policies.names():
        cls = policies[name]
        options = ", ".join(f"{f.name}={getattr(f.default, 'text', f.default)}" for f in fields(cls))
        about = (cls.__doc__ or "").splitlines()[0]
        declared = {"lr": cls.lr, "identity_at_start": cls.identity_at_start, "mergeable": cls.mergeable}
        rows.append({"policy": name, "spec": f"{name}({options})" if options else name, "about": about, **declared})
    for name, (vision, text, about) in aliases.items():
        rows.append(
            {"policy": name, "spec": name, "about": f"{about}. Vision: {vision}. Text: {text}"}
            | dict.fromkeys(("lr", "identity_at_start", "mergeable"))
        )
    return rows


def readme_table() -> str:
    """Return the catalogue as the Markdown table of the README."""
    lines = ["| policy | what it trains | lr |", "|---|---|--:|"]
    for row in catalogue():
        lr = "" if row["lr"] is None else f"{row['lr']:g}"
        lines.append(f"| `{row['spec']}` | {row['about']} | {lr} |")
    return "\n".join(lines)
