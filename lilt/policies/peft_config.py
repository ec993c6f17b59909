"""A configuration of the peft library as text: read from a spec or a file, and written so that a spec can hold it."""

from __future__ import annotations

import json
import re
import string
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PromptLearningConfig

from lilt.registry import nearest, parse_call

FILE = "adapter_config.json"
_BOOKKEEPING = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                "inference_mode", "runtime_config"}  # fmt: skip
# what a tower cannot give a tuner: most of them inject without complaint and then do nothing, or not what they are for
_UNFIT = {
    "ADALORA": "changes its ranks by a call after every training step, which is not made here",
    "ADAPTION_PROMPT": "needs peft's own model class around the tower",
    "POLY": "wants a task with every call",
    "SHADOW": "trains a second network beside the tower",
    "XLORA": "mixes trained adapters by a classifier outside the tower",
}
_STARTS = {
    ("pissa", "olora", "corda", "loftq"): "rewrites the frozen weights",
    ("eva", "lora_ga"): "needs a pass over data that is not made here",
}
_SAFE = "".join(set(string.printable) - set("(),%"))  # the rest would break the grammar of specs


@dataclass(frozen=True)
class Config:
    """A peft configuration in its written form `TYPE(option=value,…)`, without what is at its default."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Config:
        """Read `TYPE`, `TYPE(option=value,…)`, or the path of an adapter_config.json or of a folder with one."""
        head = text.partition("(")[0].strip().upper()
        if head not in _kinds():
            return cls.of(_from_file(text))
        _refuse(head, {})
        call = parse_call(text)
        if call.args:
            raise ValueError(f"in {text!r} {call.args[0]!r} has no name; expected option=value; name each option")
        known = _options(head)
        for key in call.kwargs:
            if key not in known:
                names = ", ".join(known)
                raise ValueError(f"peft's {head} has no option {key!r}; it takes: {names}.{nearest(key, known)}")
        return cls.of(_make(head, {k: _read(v, known[k]) for k, v in call.kwargs.items()}))

    @classmethod
    def of(cls, config: PeftConfig) -> Config:
        """Write down a configuration made in Python. Raises ValueError for one that no tower can take."""
        kind = _plain(config.peft_type)
        if kind not in _kinds():
            raise ValueError(f"{type(config).__name__} has no type; expected one such as peft.LoraConfig; pass that")
        known = _options(kind)
        values = {name: _plain(getattr(config, name)) for name in known}
        _refuse(kind, values)
        given = {name: value for name, value in values.items() if value != _default(known[name])}
        written = ",".join(f"{name}={_write(value, known[name])}" for name, value in given.items())
        return cls(f"{kind}({written})" if written else kind)

    @property
    def kind(self) -> str:
        """The type, as peft calls it."""
        return self.text.partition("(")[0]

    def build(self) -> PeftConfig:
        """Return a fresh configuration object; an injection changes the one it is given."""
        known = _options(self.kind)
        return _make(self.kind, {k: _read(v, known[k]) for k, v in parse_call(self.text).kwargs.items()})


def _kinds() -> dict[str, type[PeftConfig]]:
    return {str(_plain(kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _options(kind: str) -> dict[str, Field]:
    return {f.name: f for f in fields(_kinds()[kind]) if f.init and f.name not in _BOOKKEEPING}


def _make(kind: str, values: dict[str, Any]) -> PeftConfig:
    _refuse(kind, values)
    try:
        return _kinds()[kind](**values)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ValueError(f"peft does not take this {kind} configuration: {error}; got {values}; correct it") from error


def _refuse(kind: str, values: dict[str, Any]) -> None:
    """Raise for what no tower can take, whatever it is made of."""
    if issubclass(_kinds()[kind], PromptLearningConfig):
        raise ValueError(f"peft({kind}) feeds virtual tokens by peft's own model class, which no tower has; use LORA")
    if kind in _UNFIT:
        raise ValueError(f"peft({kind}) {_UNFIT[kind]}; use LORA")
    if values.get("layer_replication"):
        raise ValueError(f"peft({kind}): layer_replication makes another tower; leave it out")
    start = values.get("init_lora_weights")
    for names, reason in _STARTS.items():
        if isinstance(start, str) and start.startswith(names):
            raise ValueError(
                f"peft({kind}): init_lora_weights={start} {reason}; expected a start from which the frozen weights "
                "stay bit for bit; write true, gaussian or orthogonal"
            )


def _from_file(text: str) -> PeftConfig:
    path = Path(text).expanduser()
    if path.is_dir():
        trained = [file.name for file in path.glob("adapter_model.*")]
        if trained:
            raise ValueError(
                f"peft({text}): the folder holds a trained adapter ({trained[0]}), and lilt takes configurations only; "
                f"to start anew with this one write peft({path / FILE})"
            )
        path /= FILE
    if not path.is_file():
        fit = (kind for kind, cls in _kinds().items() if not issubclass(cls, PromptLearningConfig))
        known = sorted(set(fit) - set(_UNFIT))
        raise ValueError(
            f"peft({text}): neither a file nor a type of the peft library; expected {FILE}, a folder with one, or one "
            f"of {', '.join(known)}.{nearest(text.partition('(')[0].upper(), known)}"
        )
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        kind = values["peft_type"]
        known_options = _options(kind)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no configuration of the peft library ({error!r}); write it with peft") from None
    values = {name: value for name, value in values.items() if name not in _BOOKKEEPING}
    strange = [name for name, value in values.items() if name not in known_options and value]
    if strange:
        raise ValueError(f"{path} sets {strange[0]!r}, which this peft does not know; upgrade peft or remove it")
    return _make(kind, {name: value for name, value in values.items() if name in known_options})


def _plain(value: Any) -> Any:
    """Turn sets, enums and nested settings into what JSON has."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _default(option: Field) -> Any:
    return _plain(option.default_factory() if option.default_factory is not MISSING else option.default)


def _read(text: str, option: Field) -> Any:
    """Read a value: `a|b` is a list, what has signs of a pattern is left to peft, and the rest is JSON or a word."""
    text = unquote(text)
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    names = "list[str]" in str(option.type).lower()
    if names and text != "all-linear" and re.fullmatch(r"[\w.|-]+", text):
        return text.split("|")
    try:
        return json.loads(text)
    except ValueError:
        pass
    if names or "|" not in text:
        return text
    return [_read(part, option) for part in text.split("|")]


def _write(value: Any, option: Field) -> str:
    """Write a value so that `_read` returns it: bare where possible, else as JSON."""
    try:
        exact = json.dumps(value, separators=(",", ":"))
        bare = "|".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else exact
        for text in (bare, exact):
            written = quote(text, safe=_SAFE)
            if text == text.strip() and _read(written, option) == value:
                return written
    except TypeError:
        pass
    raise ValueError(f"peft: {option.name}={value!r} cannot be written down, and a checkpoint must; leave it out")
