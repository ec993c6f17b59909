"""A question about budgets as a user writes it, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lilt.budgets.compare import Comparison, compare, default_specs
from lilt.budgets.limits import keep, parse_limits
from lilt.budgets.plot import check_plot, plot
from lilt.budgets.show import check_key, sort_rows
from lilt.registry import split_top
from lilt.towers import meta_tower


@dataclass(frozen=True)
class Request:
    """Towers, policies and a batch, and what to do with the budgets; empty texts and 0 stand for nothing said."""

    vision: str = "demo"
    text: str = "demo"
    policies: str = ""  # separated by commas outside parentheses; all by default
    projection: str = "linear(dim=256)"
    shared: str = "none"
    batch_size: int = 64
    image_px: int = 0
    text_tokens: int = 32
    max_trainable: str = ""
    max_step: str = ""
    max_memory: str = ""
    sort: str = "trainable"
    plot: str = ""
    overwrite: bool = False


def answer(request: Request, console: Console) -> Comparison:
    """Return the budgets within the limits, sorted, and draw them if asked; a bar on console shows how far it is.

    Raises ValueError for what cannot be read, before anything is computed, and where nothing is left.
    """
    for name in ("batch_size", "text_tokens"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name}={getattr(request, name)}; expected more than 0; give a positive whole number")
    limits = parse_limits(request.max_trainable, request.max_step, request.max_memory)
    check_key(request.sort)
    picture = check_plot(request.plot, request.overwrite) if request.plot else None
    specs = split_top(request.policies, ",") if request.policies else default_specs()
    vision = meta_tower(request.vision, "vision", request.image_px or None)
    text = meta_tower(request.text, "text")
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(specs))
        found = compare(
            vision,
            text,
            specs,
            batch_size=request.batch_size,
            text_tokens=request.text_tokens,
            projection=request.projection,
            shared=request.shared,
            trainable=next((limit for limit in limits if limit.option == "max_trainable"), None),
            advance=lambda spec: progress.update(bar, description=spec, advance=1),
        )
    if not found.rows:
        spec, reason = next(iter(found.refused.items()))
        raise ValueError(f"these towers take none of the {len(found.refused)} policies; {spec}: {reason}")
    found = replace(found, rows=sort_rows(keep(found.rows, limits), request.sort))
    if picture is not None:
        plot(found.rows, found.about, picture)
    return found
