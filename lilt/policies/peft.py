"""Any configuration of the peft library, as far as the tower allows it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lilt.policies.base import Plan, Policy, register
from lilt.policies.edits import Edit, Open
from lilt.policies.injection import Inject, Rehearsal, Wrapped, rehearse, stands_for
from lilt.policies.peft_config import Config
from lilt.registry import construct, nearest, options_of, parse_call, split_top
from lilt.towers.anatomy import is_dense
from lilt.towers.base import Tower

ALL_LINEAR = Config("LORA(target_modules=all-linear)")
_NAMES = ("target_modules", "modules_to_save", "feedforward_modules", "target_parameters")
_OWN = {"IA3": "ia3", "LN_TUNING": "layernorm", "BEFT": "bitfit"}


@dataclass(frozen=True)
class Injection(Plan):
    """A plan that exchanges modules: it comes first whatever the order, and no other edit hangs on what it wraps."""

    def __add__(self, other: Plan) -> Plan:
        joint = Injection(super().__add__(other).edits)
        wrapped = [edit.path for edit in self.edits if isinstance(edit, Inject)]
        for edit in other.edits:
            if isinstance(edit, Inject):
                raise ValueError(
                    "peft twice on one tower; expected one configuration of the peft library, with other policies "
                    "beside it; put both into one, or write one of them without peft"
                )
            # a parameter that is only opened keeps its place
            if not isinstance(edit, Open) and any(f"{edit.path}.".startswith(f"{path}.") for path in wrapped):
                raise ValueError(
                    f"peft and {edit.rule} both want the module {edit.path}; a module that peft wraps takes nothing "
                    "else: leave one out, or name other modules in the configuration"
                )
        return joint

    def __radd__(self, before: Plan) -> Plan:
        return self + before


@register("peft")
@dataclass(frozen=True)
class Peft(Policy):
    """Train what a configuration of the peft library adds: TYPE(option=value,…), or its adapter_config.json.

    Names are joined by `|`: peft(LORA(r=8,target_modules=query|value)). A file is read whenever the spec is;
    `written_out` puts its content into the spec. Most types start as the pretrained tower; where the configuration
    starts elsewhere (FOURIERFT, init_lora_weights=false), so does the tower.
    Source: https://github.com/huggingface/peft
    """

    config: Config = ALL_LINEAR
    lr: ClassVar[float] = 1e-3

    @property
    def spec(self) -> str:
        """The policy as text that needs no file."""
        return f"{self.name}({self.config.text})"

    def plan(self, tower: Tower) -> Plan:
        self._check_names(tower)
        try:
            rehearsal = rehearse(tower.body, self.config.build())
        except NotImplementedError as error:
            raise self._refusal(tower, "its start is computed from the weights, and a plan sees none") from error
        except Exception as error:  # tuners fail in every way on towers they were not written for
            said = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
            raise self._refusal(tower, f"peft cannot put it in ({said})") from error
        self._check(tower, rehearsal)
        sharing = tuple(wrapped.path for wrapped in rehearsal.wrapped if not wrapped.fresh)
        edits: list[Edit] = []
        for wrapped in rehearsal.wrapped:
            edits += self._edits(wrapped, () if edits else sharing)
        why = f"opened by the {self.config.kind} configuration"
        edits += [Open(path, count, self.name, why, self.lr) for path, count in rehearsal.opened.items()]
        return Injection(tuple(edits))

    def _edits(self, wrapped: Wrapped, also: tuple[str, ...]) -> Iterator[Edit]:
        """Yield one edit for each of a module's parameters that something new stands for."""
        groups: dict[str, list[str]] = {}
        for name in wrapped.fresh:
            groups.setdefault(stands_for(name, wrapped.own), []).append(name)
        if not groups:  # it works with tensors that another module holds
            groups[stands_for("", wrapped.own)] = []
        for target, names in groups.items():
            count = sum(wrapped.fresh[name] for name in names)
            why = f"{self.config.kind} of the peft library"
            make = self.config.build
            yield Inject(wrapped.path, count, self.name, why, self.lr, target, tuple(names), make, also)

    def _check_names(self, tower: Tower) -> None:
        """Raise for a name that matches nothing: peft passes over it without a word."""
        config: Any = self.config.build()
        modules = {path: list(module.parameters()) for path, module in tower.body.named_modules() if path}
        parameters = dict(tower.body.named_parameters())
        if getattr(config, "target_modules", None) == "all-linear" and not any(
            is_dense(leaf.module) for leaf in tower.anatomy.leaves
        ):
            raise self.nothing(tower, "linear layers")
        for option in _NAMES:
            names = getattr(config, option, None)
            known: Iterable[str] = parameters if option == "target_parameters" else modules
            for name in sorted(names) if isinstance(names, (list, set, tuple)) else ():
                found = [path for path in known if f".{path}".endswith(f".{name}")]
                if not found:
                    close = nearest(name, {path.rpartition(".")[2] for path in known})
                    raise self._refusal(tower, f"{option}={name} matches nothing in it", close)
                bare = [path for path in found if path in modules and not modules[path]]
                if bare:
                    raise self._refusal(tower, f"{option}={name} matches {bare[0]}, which has no weights")

    def _check(self, tower: Tower, rehearsal: Rehearsal) -> None:
        """Raise where the layers would be put in but could not work."""
        if rehearsal.outside:
            raise self._refusal(tower, f"{rehearsal.outside[0]} would be trained outside the tower and get lost")
        if not rehearsal.opened and not any(wrapped.fresh for wrapped in rehearsal.wrapped):
            raise self._refusal(tower, "nothing in it would be trained")
        for wrapped in rehearsal.wrapped:
            if not wrapped.own:
                raise self._refusal(tower, f"{wrapped.path} has no weights, so peft's layer there would do nothing")
            if wrapped.layer == "MultiheadAttention":
                # seen in peft 0.18 to 0.21: the update of out_proj counts twice, and the frozen weights drift in bf16
                raise self._refusal(tower, f"peft applies its update of {wrapped.path}.out_proj twice")
            if isinstance(tower.body.get_submodule(wrapped.path.rpartition(".")[0]), nn.TransformerEncoderLayer):
                raise self._refusal(tower, f"in eval mode torch reads the weight of {wrapped.path} past peft's layer")
            inside = [leaf for leaf in tower.anatomy.leaves if f"{leaf.path}.".startswith(f"{wrapped.path}.")]
            if inside and all(leaf.order is None for leaf in inside):
                raise self._refusal(
                    tower, f"peft works in forwards, and that of {wrapped.path} is never called: its weights are read"
                )

    def _refusal(self, tower: Tower, reason: str, close: str = "") -> ValueError:
        own = _OWN.get(self.config.kind, "lora")
        return ValueError(
            f"{self.spec} on the {tower.side} tower {tower.spec!r}: {reason}; it has {tower.anatomy.describe()}."
            f"{close} Name other modules in the configuration, or use {own}; each tower may have its own policy"
        )


def written_out(spec: str) -> str:
    """Return a policy spec in which no peft configuration refers to a file, so that it says the same without it."""
    parts = []
    for text in split_top(spec, "+"):
        call = parse_call(text)
        parts.append(construct(Peft, call, options_of(Peft)).spec if call.name == Peft.name else text)
    return "+".join(parts)
