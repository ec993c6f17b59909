"""Elements: what is not HTML is escaped, wherever it stands."""

from __future__ import annotations

import pytest

from lilt.report.curves import smoothed
from lilt.report.findings import by_place, compared
from lilt.report.markup import Html, el, grid, join, page, terms
from lilt.report.parameters import short
from tests.report.dom import read

EVIL = """<img src=x onerror="alert('1')"> & </td></title></style><script>"""


def test_text_is_escaped_in_every_place() -> None:
    parts = (
        el("p", EVIL, title=EVIL), grid([EVIL, EVIL], [[EVIL, EVIL]], EVIL), terms([(EVIL, EVIL)]), join([EVIL]),
    )  # fmt: skip
    text = page(EVIL, "p { color: red; }", *parts)
    root = read(text)
    assert not root.all("script") and not root.all("img")
    assert root.one("p").attributes["title"] == EVIL == root.one("p").text == root.one("title").text
    assert root.one("table").rows() == [[EVIL, EVIL], [EVIL, EVIL]] and root.one("caption").text == EVIL
    assert root.one("dt").text == EVIL == root.one("dd").text


def test_html_is_not_escaped_again() -> None:
    assert el("p", el("b", "a & b"), " & c") == "<p><b>a &amp; b</b> &amp; c</p>"
    assert isinstance(join([el("b")]), Html)
    assert el("img", src="x", alt="", width=None) == '<img src="x" alt="">'
    assert el("td", class_="a", aria_label="b") == '<td class="a" aria-label="b"></td>'


@pytest.mark.parametrize(
    ("value", "written"), [(0, "0"), (999, "999"), (1000, "1k"), (2.5e5, "250k"), (1.5e6, "1.5M"), (2e9, "2G")]
)
def test_axes_are_written_short(value: float, written: str) -> None:
    assert short(value) == written


def test_smoothing_is_a_mean_that_passes_over_gaps() -> None:
    nan = float("nan")
    assert smoothed([3.0, 3.0, nan, 3.0]) == pytest.approx([3.0, 3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0], weight=0.5) == [1.0, pytest.approx((0.5 * 1 + 2) / 1.5)]
    assert smoothed([nan, 2.0])[1] == 2.0


def test_verdicts() -> None:
    values = {
        "knn/top1/before": 50.0, "knn/top1/after": 60.0, "knn/top1/kept": 120.0, "knn/top5/before": 80.0,
        "knn/top5/after": 79.0, "knn/top5/kept": 98.75, "classifier/top1/before": 51.0, "classifier/top1/after": 21.0,
        "classifier/top1/kept": 41.2, "probe/penalty/before": 1.0, "probe/penalty/after": 9.0, "num_knn/test": 7.0,
        "broken/before": 3.0,
    }  # fmt: skip
    assert [(row.name, row.verdict) for row in compared(values)] == [
        ("knn/top1", "gained"), ("knn/top5", "kept"), ("classifier/top1", "lost"), ("probe/penalty", ""),
    ]  # fmt: skip


def test_values_of_places_become_maps() -> None:
    found = by_place({"vision/block 10/norm": 1.0, "vision/block 9/mlp": 2.0, "vision/norm": 3.0, "text/pooled": 0.5})
    assert list(found["vision"]) == ["block 9", "block 10", "outside blocks"]
    assert found["vision"]["outside blocks"] == {"norm": 3.0} and found["text"] == {"pooled": {"value": 0.5}}
    assert by_place({"text_to_image/R@1": 1.0}) == {}
