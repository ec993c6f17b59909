"""The answers to a question about towers, as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lilt import distributed
from lilt.advise.advice import Advice, Failed, compare_towers
from lilt.advise.look import FAULTS, Looked, Looker, alike
from lilt.advise.pairs import choose
from lilt.advise.question import Question
from lilt.advise.step import predict
from lilt.budgets.counter import Counter
from lilt.build import read_split
from lilt.towers import Tower, build_tower

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def advise(question: Question, console: Console) -> Iterator[Advice | Failed]:
    """Yield the advice on each pair of towers, text tower after text tower, and each tower that failed.

    All towers are built first, so that what is wrong with one is known before minutes are spent on the others. Bars and
    what is left out are shown on the console. Raises ValueError where nothing is left to compare.
    """
    question.check()
    source = f"the split {question.split!r} of {question.data}"
    pairs = choose(read_split(question.data, question.split, question.image_root), question.pairs, source)
    question.check_enough(len(pairs), source)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    distributed.use_all_cores()
    looker = Looker(question, device, [], [])
    eyes = _built(question.vision, "vision", looker)
    ears = _built(question.text, "text", looker)
    yield from _failed(looker)
    _check_left(eyes, "vision")
    _check_left(ears, "text")
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=len(alike(eyes)) * len(pairs))
        visions, pairs = looker.at_images(eyes, pairs, lambda count: progress.update(bar, advance=count))
        yield from _failed(looker)
        _check_left(visions, "vision")
        if looker.faults:
            said = f"{len(looker.faults)} images could not be read and are left out (first: {looker.faults[0]})"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        bar = progress.add_task("captions", total=len(ears) * len(pairs))
        counter = Counter()
        for spec, tower in ears.items():
            text = looker.at_captions(spec, tower, pairs, lambda count: progress.update(bar, advance=count))
            yield from _failed(looker)
            if text is None:
                continue
            for other, vision in visions.items():
                yield _answer(question, (other, vision), (spec, text), counter)


def _built(specs: tuple[str, ...], side: str, looker: Looker) -> dict[str, Tower]:
    towers = {}
    for spec in dict.fromkeys(specs):
        px = looker.question.image_px or None
        try:
            towers[spec] = build_tower(spec, side, image_px=px).to(looker.device)
        except FAULTS as error:
            looker.failed.append(Failed(spec, str(error)))
    return towers


def _failed(looker: Looker) -> Iterator[Failed]:
    """Yield the towers that failed since the last time."""
    yield from looker.failed
    looker.failed.clear()


def _check_left(towers: Mapping[str, Any], side: str) -> None:
    if not towers:
        raise ValueError(
            f"no {side} tower is left to compare; expected at least one that can be built and run; mend what failed"
        )


def _answer(question: Question, vision: tuple[str, Looked], text: tuple[str, Looked], counter: Counter) -> Advice:
    """Compare two towers and predict their step; that a policy does not fit them is a part of the answer."""
    eye, ear = vision[1], text[1]
    advice = compare_towers((vision[0], eye.views), (text[0], ear.views), question.policy)
    try:
        step = predict(eye.bare, ear.bare, question.policy, question.batch_size, question.text_tokens, counter)
    except FAULTS as error:
        return replace(advice, refused=str(error))
    ms = question.batch_size * (eye.ms + ear.ms) * step.forwards
    return replace(advice, trainable=step.trainable, step_flops=step.flops, step_ms=ms)
