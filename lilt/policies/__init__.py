"""Tuning policies: which parameters of a finished tower are trained, planned first and then applied from outside."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lilt.policies import adapter, deep_adapter, lora, select
from lilt.policies.base import ALL, Blocks, Plan, Policy, aliases, apply, parse_policy, plan, policies

aliases["lit"] = ("frozen", "full", "vision locked, text trained in full (Zhai et al. 2022)")
aliases["lilt"] = (
    "adapter(reduction=4,place=input)+layernorm",
    "adapter(reduction=4,place=output)+layernorm",
    "LwA: adapters in every layer and every LayerNorm (Khan & Fu 2023)",
)


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


__all__ = [
    "ALL", "Blocks", "Plan", "Policy", "adapter", "aliases", "apply", "catalogue", "deep_adapter", "lora",
    "parse_policy", "plan", "policies", "readme_table", "select",
]  # fmt: skip
