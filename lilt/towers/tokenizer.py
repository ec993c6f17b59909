"""Tokenizers behind one face: special tokens, own padding, and an exact count of what was cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Encoding = dict[str, list[int]]


class HfTokenizer:
    """A transformers tokenizer with its own special tokens, token types and padding ids, always padded on the right."""

    def __init__(self, tokenizer: Any, context_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # decoders come without one; the mask hides it

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[list[Encoding], int]:
        """Return one encoding per text and how many were cut at max_tokens (default: the context length)."""
        limit = min(max_tokens or self.context_tokens, self.context_tokens)
        batch = self.tokenizer(list(texts), truncation=True, max_length=limit)
        full = [i for i, ids in enumerate(batch["input_ids"]) if len(ids) >= limit]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "longer than the maximum" is what is being counted
            longer = self.tokenizer([texts[i] for i in full], verbose=False)["input_ids"] if full else []
        cut = sum(len(ids) > limit for ids in longer)
        return [{key: batch[key][i] for key in batch} for i in range(len(texts))], cut

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        """Pad to the longest of the batch."""
        keys = encodings[0].keys()
        length = max(len(e["input_ids"]) for e in encodings)
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        rows = {k: [e[k] + [fill.get(k, 0)] * (length - len(e[k])) for e in encodings] for k in keys}
        return {key: torch.tensor(value, dtype=torch.long) for key, value in rows.items()}

    def describe(self) -> dict[str, Any]:
        """Return class, size, special tokens and context length."""
        specials = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        return {
            "class": type(self.tokenizer).__name__,
            "vocabulary": len(self.tokenizer),
            "special_tokens": specials,
            "context_tokens": self.context_tokens,
        }


class FixedTokenizer:
    """A callable `texts -> ids (N, L)` of fixed length, as in open_clip; pad_id marks what is not text.

    roomier is the same with place for one token more: it tells a text that was cut from one that just fits.
    """

    def __init__(
        self,
        call: Callable[[list[str]], Tensor],
        context_tokens: int,
        pad_id: int = 0,
        roomier: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        self.call = call
        self.context_tokens = context_tokens
        self.pad_id = pad_id
        self.roomier = roomier

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[list[Encoding], int]:
        """Return one encoding per text and how many were cut; without roomier, a full context counts as cut."""
        rows = self.call(list(texts)).tolist()
        limit = min(max_tokens or self.context_tokens, self.context_tokens)
        lengths = self._lengths(rows)
        cut = sum(length > limit for length in lengths)
        if limit == self.context_tokens:
            full = [text for text, length in zip(texts, lengths, strict=True) if length == limit]
            longer = self._lengths(self.roomier(full).tolist()) if self.roomier and full else [limit + 1] * len(full)
            cut = sum(length > limit for length in longer)
        out = []
        for row, length in zip(rows, lengths, strict=True):
            if length > limit:
                # keep the end-of-text token, which the tower reads
                row = row[: limit - 1] + [row[length - 1]] + [self.pad_id] * (len(row) - limit)
            out.append({"input_ids": row, "attention_mask": [int(i < min(length, limit)) for i in range(len(row))]})
        return out, cut

    def _lengths(self, rows: list[list[int]]) -> list[int]:
        return [max((i + 1 for i, t in enumerate(row) if t != self.pad_id), default=1) for row in rows]

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        """Stack; all rows have one length."""
        return {key: torch.tensor([e[key] for e in encodings], dtype=torch.long) for key in encodings[0]}

    def describe(self) -> dict[str, Any]:
        """Return class and context length."""
        return {"class": type(self.call).__name__, "context_tokens": self.context_tokens, "pad_id": self.pad_id}
