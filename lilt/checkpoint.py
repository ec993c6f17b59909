"""A checkpoint: the trained tensors, the contract they were trained under, and a card for people."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilt import distributed
from lilt.config import ModelConfig
from lilt.model import TwoTower
from lilt.policies import parse_policy
from lilt.towers import ImageContract, Tower

ADAPTER, CONTRACT, CARD = "adapter.safetensors", "lilt.json", "README.md"
FORMAT = 1
_LIBRARIES = ("lilt", "torch", "transformers", "timm", "open_clip_torch", "peft", "safetensors")


class Trains(Protocol):
    """Whatever has parameters that are trained."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Return them by name."""
        ...


def save(model: TwoTower, config: ModelConfig, folder: str | Path, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write adapter.safetensors, lilt.json and README.md; each file is replaced whole, the contract last.

    Where tensors are spread over ranks all of them must call it, and the main one writes.
    """
    target = Path(folder)
    trained = model.trained()
    tensors = {name: distributed.whole(p.detach()).cpu().contiguous() for name, p in trained.items()}
    if any(map(distributed.is_spread, trained.values())) and not distributed.is_main():
        return target
    target.mkdir(parents=True, exist_ok=True)
    fresh = target / f"{ADAPTER}.tmp"
    save_file(tensors, fresh, metadata={"format": "pt"})
    flush(fresh)
    contract = describe(model, config, tensors, metrics or {}) | {"adapter_sha256": _sha256(fresh)}
    fresh.replace(target / ADAPTER)
    _write(target / CARD, _card(contract))
    _write(target / CONTRACT, json.dumps(contract, indent=2) + "\n")
    return target


def describe(model: TwoTower, config: ModelConfig, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> dict:
    """Return the contract: everything needed to build the model again and to notice that something else was built."""
    settings = {name: value for name, value in asdict(config).items() if name in ModelConfig.__dataclass_fields__}
    # the maps themselves: the file or the function that gave one may change or be gone when this is loaded
    settings |= {"vision_roles": model.vision.roles, "text_roles": model.text.roles}
    return {
        "format": FORMAT,
        "model": settings,
        "towers": {"vision": _tower(model.vision), "text": _tower(model.text)},
        "tensors": {name: list(t.shape) for name, t in sorted(tensors.items())},
        "trained": sum(t.numel() for t in tensors.values()),
        "total": sum(p.numel() for p in model.parameters()),
        "metrics": dict(metrics),
        **({"init": init} if (init := getattr(config, "init", None)) else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def _tower(tower: Tower) -> dict[str, Any]:
    contract = tower.contract
    if isinstance(contract, ImageContract):
        wants: dict[str, Any] = {k: v for k, v in asdict(contract).items() if k != "transform"}
        wants = {k: list(v) if isinstance(v, tuple) else v for k, v in wants.items()}
        if contract.transform is not None:
            wants = {"transform": getattr(contract.transform, "__qualname__", type(contract.transform).__name__)}
    else:
        wants = contract.describe()
    return {"spec": tower.spec, "pool": tower.pool, "dim": tower.dim, "fingerprint": tower.fingerprint, "input": wants}


def read_contract(folder: str | Path) -> dict[str, Any]:
    """Read lilt.json and check that the adapter beside it is the one it was written with."""
    source = Path(folder)
    if not (source / CONTRACT).is_file() or not (source / ADAPTER).is_file():
        raise ValueError(f"{source} holds no lilt checkpoint; expected {CONTRACT} and {ADAPTER}; check the path")
    try:
        contract: dict[str, Any] = dict(json.loads((source / CONTRACT).read_text(encoding="utf-8")))
        newer = contract["format"] > FORMAT
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source / CONTRACT} is not a contract of lilt ({error!r}); copy the folder again") from None
    if newer:
        raise ValueError(f"{source} has format {contract['format']}, this lilt reads up to {FORMAT}; upgrade lilt")
    if _sha256(source / ADAPTER) != contract["adapter_sha256"]:
        raise ValueError(
            f"{source / ADAPTER} is not the file that {CONTRACT} was written with (torn or exchanged); copy both "
            "files again, or go on from the run's state with --resume"
        )
    return contract


def adapter_bytes(folder: str | Path) -> int:
    """Return the size of the trained tensors as a file."""
    return (Path(folder) / ADAPTER).stat().st_size


def settings_of(contract: Mapping[str, Any]) -> ModelConfig:
    """Return the settings a checkpoint was built with."""
    return ModelConfig(**contract["model"])


def restore(model: TwoTower, folder: str | Path) -> dict[str, Any]:
    """Put the trained tensors of a checkpoint into a model built the same way; return the contract.

    Raises ValueError on other base weights, another tokenizer, or a missing or surplus tensor, naming it.
    """
    contract = read_contract(folder)
    for side in ("vision", "text"):
        _check_tower(side, contract["towers"][side], getattr(model, side))
    load_trained(model, load_file(Path(folder) / ADAPTER), str(folder))
    return contract


def load_trained(model: Trains, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into exactly the trained parameters of a model, be they spread over ranks or not."""
    trained = model.trained()
    for problem, names in (("misses", set(trained) - set(tensors)), ("has surplus", set(tensors) - set(trained))):
        if names:
            raise ValueError(
                f"{source} {problem} {len(names)} tensors (first: {min(names)!r}); the model was built with another "
                "policy, projection or role map; build it as lilt.json says"
            )
    with torch.no_grad():
        for name, parameter in trained.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{source}: {name!r} has shape {tuple(tensors[name].shape)}, the model {tuple(parameter.shape)}; "
                    "build the model as lilt.json says"
                )
            parameter.copy_(distributed.spread_like(tensors[name], parameter))


def begin_from(model: TwoTower, config: ModelConfig, run: str) -> str:
    """Put the trained tensors of a run into a model that was built for another; return the sum of the file.

    Raises ValueError naming the first part of the two models that differs.
    """
    contract = read_contract(run)
    then = settings_of(contract)
    for side in ("vision", "text"):
        specs = [c.policies[side] for c in (then, config)]
        if parse_policy(specs[0], side) != parse_policy(specs[1], side):
            raise _other(run, f"{side} policy", specs[0], specs[1])
        theirs, ours = contract["model"][f"{side}_roles"], getattr(model, side).roles
        if theirs != ours:
            raise _other(run, f"map of {side}_roles", theirs, ours)
    for name in ("projection", "shared"):
        if getattr(then, name) != getattr(config, name):
            raise _other(run, name, getattr(then, name), getattr(config, name))
    restore(model, run)
    return str(contract["adapter_sha256"])


def _other(run: str, what: str, theirs: Any, ours: Any) -> ValueError:
    return ValueError(
        f"init={run} was trained with the {what} {theirs!r}, this run has {ours!r}; expected the same, as its tensors "
        "are read by name; give this run the settings of that one, or leave --init out"
    )


def _check_tower(side: str, saved: Mapping[str, Any], tower: Tower) -> None:
    found = _tower(tower)
    if saved["spec"] != tower.spec:
        _check_weights(side, saved, tower)
    # of the same tower its options come first: a table of positions for other images has another fingerprint too
    for key in ("pool", "dim", "input"):
        if json.loads(json.dumps(found[key])) != saved[key]:
            raise ValueError(
                f"the {side} tower {tower.spec!r} has {key} {found[key]}, the checkpoint {saved[key]}: "
                "build the tower with the same options"
            )
    _check_weights(side, saved, tower)


def _check_weights(side: str, saved: Mapping[str, Any], tower: Tower) -> None:
    if saved["fingerprint"] != tower.fingerprint:
        raise ValueError(
            f"the {side} tower {tower.spec!r} has other base weights than the checkpoint was trained on "
            f"(fingerprint {tower.fingerprint[:12]}, expected {saved['fingerprint'][:12]}); use the weights of "
            f"{saved['spec']!r} as they were"
        )


def holds_run(folder: str | Path) -> bool:
    """Say whether a folder holds a checkpoint or a started run."""
    return any((Path(folder) / name).exists() for name in (CONTRACT, ADAPTER, "metrics.jsonl", "state"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(file: Path) -> None:
    """Wait until a file is on disk: renamed before, it could be empty under its final name after a power cut."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _write(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    flush(fresh)
    fresh.replace(file)


def _card(contract: Mapping[str, Any]) -> str:
    """Return the model card."""
    model, towers, policies = contract["model"], contract["towers"], settings_of(contract).policies
    share = 100 * contract["trained"] / contract["total"]
    metrics = "\n".join(f"| {k} | {v:.2f} |" for k, v in contract["metrics"].items() if isinstance(v, (int, float)))
    return f"""---
library_name: lilt
tags: [lilt, image-text-retrieval]
---
# Adapter for {towers["vision"]["spec"]} and {towers["text"]["spec"]}

{contract["trained"]:,} trained values ({share:.2f} % of the model) that align these two towers; the towers are
not in this folder. Policy: `{policies["vision"]}` (vision),
`{policies["text"]}` (text). Projection: `{model["projection"]}`.

```python
import lilt
model = lilt.load("FOLDER")
model.embed(images=["photo.jpg"], texts=["a caption"])
```

| metric | value |
|---|---|
{metrics}
"""
