"""Advice: which towers, and which of their layers, see images and captions alike before anything is trained."""

from __future__ import annotations

from lilt.advise.advice import Advice, Failed, ranked
from lilt.advise.answer import advise
from lilt.advise.neighbours import Neighbours, mutual
from lilt.advise.pairs import Chosen, choose
from lilt.advise.question import Question
from lilt.advise.show import table
from lilt.advise.view import Match, View, match

__all__ = [
    "Advice", "Chosen", "Failed", "Match", "Neighbours", "Question", "View", "advise", "choose", "match", "mutual",
    "ranked", "table",
]  # fmt: skip
