"""The gallery: captions and images with what was found for them, and the pictures themselves."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

from lilt.data.images import UNREADABLE, open_image
from lilt.report.markup import Html, el, section
from lilt.report.retrievals import TOP, Gallery, Hit, Search

SIDE_PX = 192  # of the longer side of a thumbnail


class Thumbnails:
    """Pictures as small JPEGs in the page, each made once; those that cannot be read are counted."""

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self.made: dict[int, str | None] = {}

    @property
    def missing(self) -> int:
        """How many could not be read."""
        return sum(made is None for made in self.made.values())

    def __call__(self, index: int) -> Html:
        """Return the picture of an image of the gallery, or a place that says that there is none."""
        sample = self.gallery.images[index]
        if index not in self.made:
            self.made[index] = thumbnail(str(sample.image))
        source = self.made[index]
        if source is None:
            return el("span", "this image cannot be read", class_="missing")
        return el("img", src=source, alt=f"picture of: {sample.captions[0]}")


def thumbnail(path: str) -> str | None:
    """Return a picture as a small JPEG in a data URI, None where it cannot be read."""
    try:
        picture = open_image(path)
    except UNREADABLE:
        return None
    picture.thumbnail((SIDE_PX, SIDE_PX))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def gallery_section(gallery: Gallery | None, reason: str) -> Html:
    """Return the section; reason says why there is no gallery."""
    if gallery is None:
        return section("gallery", "Gallery", el("p", reason, class_="absent"))
    picture = Thumbnails(gallery)
    captions = _searches("Images for captions", gallery.by_caption, lambda s: _for_caption(gallery, s, picture))
    images = _searches("Captions for images", gallery.by_image, lambda s: _for_image(gallery, s, picture))
    return section("gallery", "Gallery", *_about(gallery, picture.missing), captions, images)


def _about(gallery: Gallery, missing: int) -> list[Html]:
    said = (
        f"{len(gallery.images):,} images and {len(gallery.captions):,} captions of the split {gallery.split!r}: R@1 "
        f"text → image {gallery.first[0]:.2f} %, image → text {gallery.first[1]:.2f} %. Shown are the first of a "
        "shuffle that is always the same, half of them right where there are so many. Beside each answer: its place "
        f"and its cosine. Where the right answer is not among the best {TOP}, it stands behind them."
    )
    shown = [el("p", said)]
    if gallery.faults:
        path, why = gallery.faults[0]
        lost = f"{len(gallery.faults):,} images could not be read and were left out (first: {path}: {why})."
        shown.append(el("p", lost, class_="note"))
    if missing:
        shown.append(el("p", f"{missing:,} images that were read before cannot be read any more.", class_="note"))
    return shown


def _searches(title: str, searches: Sequence[Search], show: Callable[[Search], Html]) -> Html:
    right = sum(s.rank == 1 for s in searches)
    count = f"{right} right, {len(searches) - right} wrong"
    return el("div", el("h3", f"{title} ({count})"), *(show(s) for s in searches))


def _for_caption(gallery: Gallery, found: Search, picture: Thumbnails) -> Html:
    hits = (
        el("li", picture(hit.index), _place(hit), class_=_kind("hit", hit), data_place=str(hit.place))
        for hit in found.hits
    )
    head = el("header", _verdict(found), el("blockquote", gallery.captions[found.query]))
    return _article("caption", found, head, el("ol", *hits, class_="pictures"))


def _for_image(gallery: Gallery, found: Search, picture: Thumbnails) -> Html:
    hits = (
        el("li", _place(hit), el("q", gallery.captions[hit.index]), class_=_kind("hit", hit), data_place=str(hit.place))
        for hit in found.hits
    )
    head = el("header", _verdict(found))
    return _article(
        "image", found, head, el("div", picture(found.query), el("ol", *hits, class_="captions"), class_="beside")
    )


def _article(kind: str, found: Search, *children: Html) -> Html:
    verdict = "right" if found.rank == 1 else "wrong"
    return el(
        "article",
        *children,
        class_=f"search {verdict}",
        data_kind=kind,
        data_query=str(found.query),
        data_rank=str(found.rank),
    )


def _verdict(found: Search) -> Html:
    return el("strong", "✓ right" if found.rank == 1 else f"✗ wrong: rank {found.rank:,}", class_="verdict")


def _kind(name: str, hit: Hit) -> str:
    return f"{name} own" if hit.own else name


def _place(hit: Hit) -> Html:
    # not by colour alone
    mark = el("b", "✓ its own") if hit.own else None
    return el("small", f"{hit.place:,} · {hit.cosine:.3f} ", mark)
