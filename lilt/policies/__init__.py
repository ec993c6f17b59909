"""Tuning policies: which parameters of a finished tower are trained, planned first and then applied from outside."""

from __future__ import annotations

from lilt.policies import adapter, deep_adapter, lora, select
from lilt.policies.base import ALL, Blocks, Plan, Policy, aliases, apply, parse_policy, plan, policies
from lilt.policies.catalogue import catalogue, readme_table
from lilt.policies.fate import Fate, fates, summary

aliases["lit"] = ("frozen", "full", "vision locked, text trained in full (Zhai et al. 2022)")
aliases["lilt"] = (
    "adapter(reduction=4,place=input)+layernorm",
    "adapter(reduction=4,place=output)+layernorm",
    "LwA: adapters in every layer and every LayerNorm (Khan & Fu 2023)",
)

__all__ = [
    "ALL", "Blocks", "Fate", "Plan", "Policy", "adapter", "aliases", "apply", "catalogue", "deep_adapter", "fates",
    "lora", "parse_policy", "plan", "policies", "readme_table", "select", "summary",
]  # fmt: skip
