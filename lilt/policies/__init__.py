"""Tuning policies: which parameters of a finished tower are trained, planned first and then applied from outside."""

from __future__ import annotations

from lilt.policies import adapter, deep_adapter, ia3, lora, peft, prompt, select
from lilt.policies.base import ALL, Blocks, Plan, Policy, aliases, apply, parse_policy, plan, policies
from lilt.policies.catalogue import catalogue, readme_table
from lilt.policies.fate import Fate, fates, summary
from lilt.policies.liveness import check_alive

aliases["lit"] = ("frozen", "full", "vision locked, text trained in full (Zhai et al. 2022)")
aliases["lit_mirror"] = ("full", "frozen", "text locked, vision trained in full")
aliases["lilt"] = (
    "adapter(reduction=4,place=input)+layernorm",
    "adapter(reduction=4,place=output)+layernorm",
    "LwA: adapters in every layer and every LayerNorm (Khan & Fu 2023)",
)

__all__ = [
    "ALL", "Blocks", "Fate", "Plan", "Policy", "adapter", "aliases", "apply", "catalogue", "check_alive",
    "deep_adapter", "fates", "ia3", "lora", "parse_policy", "peft", "plan", "policies", "prompt", "readme_table",
    "select", "summary",
]  # fmt: skip
