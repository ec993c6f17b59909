"""Evaluation: what a model finds, knows and has kept, counted honestly."""

from __future__ import annotations

from lilt.evaluate import (
    classifier,
    conserve,
    drift,
    finetune,
    knn,
    moved,
    probe,
    retrieve,
    score_finetune,
    score_probe,
    similarity,
    text_probe,
    winoground,
    zeroshot,
)
from lilt.evaluate.embed import Embedded, embed_split, evaluate_retrieval, flat
from lilt.evaluate.retrieval import retrieval
from lilt.evaluate.subject import Setting, Subject
from lilt.evaluate.task import Finished, Task, evaluate, parse_task, tasks

__all__ = [
    "Embedded", "Finished", "Setting", "Subject", "Task", "classifier", "conserve", "drift", "embed_split", "evaluate",
    "evaluate_retrieval", "finetune", "flat", "knn", "moved", "parse_task", "probe", "retrieval", "retrieve",
    "score_finetune", "score_probe", "similarity", "tasks", "text_probe", "winoground", "zeroshot",
]  # fmt: skip
