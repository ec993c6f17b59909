"""Options and their mistakes, known before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

import jsonargparse
from jsonargparse import ArgumentParser, Namespace

from lilt.config import TrainConfig
from lilt.registry import nearest

SWITCHES = ("--resume", "--overwrite", "--checkpointing", "--compile")


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse; a complaint about an unknown option names the nearest known one."""
    try:
        return parser.parse_args(_switches(argv))
    except jsonargparse.ArgumentError as error:
        message = str(error)
    found = re.search(r"[Uu]nrecognized arguments?: -*([\w-]+)|(?:[Kk]ey|Option) ['\"]?(\w+)['\"]? is not", message)
    if found is None:
        raise ValueError(message)
    key = (found[1] or found[2]).replace("-", "_")
    known = parser.get_defaults().keys()
    raise ValueError(f"unknown option {key!r}; {parser.prog} --help lists all.{nearest(key, known)}")


def _switches(argv: Sequence[str]) -> list[str]:
    """Read `--resume` alone as `--resume true`."""
    following = [*argv[1:], ""][: len(argv)]
    alone = [a in SWITCHES and b not in ("true", "false") for a, b in zip(argv, following, strict=True)]
    return [f"{a}=true" if bare else a for a, bare in zip(argv, alone, strict=True)]


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """Parse the options of `lilt train`; a --config file is overridden by what follows it."""
    return train_config(parse(train_parser("lilt train", "Align two towers."), argv))


def train_parser(prog: str, about: str) -> ArgumentParser:
    """Return a parser of everything that a training run can be told."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a recipe (.yaml)")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def train_config(given: Namespace) -> TrainConfig:
    """Return the settings of a run among what was parsed."""
    return TrainConfig(**{f.name: getattr(given, f.name) for f in fields(TrainConfig)})
