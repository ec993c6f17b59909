"""HTML that cannot be forgotten to be escaped: text becomes HTML in one place only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID = ("br", "col", "img", "meta")  # elements that have no end
# no script runs and nothing is fetched, whatever a page holds: what is not in the file is not shown
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


def el(name: str, /, *children: str | None, **attributes: str | None) -> Html:
    """Return an element; children and attributes that are not `Html` are escaped, those that are None left out.

    A trailing _ of an attribute's name falls away (class_), other _ become - (aria_label).
    """
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    opened = "".join([f"<{name}", *(f' {key}="{escape(value)}"' for key, value in given), ">"])
    return Html(opened if name in VOID else f"{opened}{join(children)}</{name}>")


def join(parts: Iterable[str | None]) -> Html:
    """Return parts one after the other, escaped where they are not `Html`."""
    known = (part for part in parts if part is not None)
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in known))


def cell(text: str, number: bool = True) -> Html:
    """Return a cell of a table; numbers stand below one another."""
    return el("td", text, class_="number" if number else None)


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[Html]]], caption: str, words: int = 1) -> Html:
    """Return a table of rows (name, cells); the first so many columns are words, the others numbers."""
    titles = (el("th", text, scope="col", class_=None if n < words else "number") for n, text in enumerate(heads))
    body = (el("tr", el("th", name, scope="row"), *cells) for name, cells in rows)
    whole = el("table", el("caption", caption), el("thead", el("tr", *titles)), el("tbody", *body))
    # where it is wider than a telephone, the table scrolls and not the page
    return el("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str, words: int = 1) -> Html:
    """Return a table of plain text, of which the first column names the row."""
    made = ((row[0], [cell(text, n >= words) for n, text in enumerate(row[1:], 1)]) for row in rows)
    return table(heads, made, caption, words)


def terms(pairs: Iterable[tuple[str, str]]) -> Html:
    """Return a list of names and what they stand for."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs))


def fold(title: str, *children: str | None) -> Html:
    """Return what is shown when somebody opens it."""
    return el("details", el("summary", title), *children)


def section(name: str, title: str, *children: str | None) -> Html:
    """Return a part of a page, with the name that links to it use."""
    return el("section", el("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title")


def page(title: str, style: str, *children: str | None) -> str:
    """Return a whole document."""
    head = (
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    return f"<!doctype html>\n{el('html', el('head', *head), el('body', *children), lang='en')}\n"
