"""Tokenizers behind one face: special tokens, own padding, and an exact count of what was cut."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lilt.towers.base import Text

Encoding = dict[str, list[int]]


class HfTokenizer:
    """A transformers tokenizer with its own special tokens, token types and padding ids, always padded on the right."""

    def __init__(self, tokenizer: Any, context_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # decoders come without one; the mask hides it

    def encode(self, texts: Sequence[Text], max_tokens: int | None = None) -> tuple[list[Encoding], int]:
        """Return one encoding per text or pair and how many were cut at max_tokens (default: the context length).

        Of a pair the longer text is cut first.
        """
        limit = min(max_tokens or self.context_tokens, self.context_tokens)
        batch = self.tokenizer(*_columns(texts), truncation=True, max_length=limit)
        full = [i for i, ids in enumerate(batch["input_ids"]) if len(ids) >= limit]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "longer than the maximum" is what is being counted
            longer = self.tokenizer(*_columns([texts[i] for i in full]), verbose=False)["input_ids"] if full else []
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


def _columns(texts: Sequence[Text]) -> list[list[str]]:
    """Return the texts, or the first and the second ones of pairs."""
    pairs = [text for text in texts if isinstance(text, tuple)]
    return [list(column) for column in zip(*pairs, strict=True)] if pairs else [list(texts)]  # type: ignore[arg-type]


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

    def encode(self, texts: Sequence[Text], max_tokens: int | None = None) -> tuple[list[Encoding], int]:
        """Return one encoding per text and how many were cut; without roomier, a full context counts as cut.

        Raises ValueError for pairs, which such a tokenizer cannot join.
        """
        single = [text for text in texts if isinstance(text, str)]
        if len(single) < len(texts):
            raise ValueError(
                f"the tokenizer {type(self.call).__name__} was given two texts to join, and takes one; expected a "
                "transformers tokenizer, which has a token between the two; let each go through the tower by itself"
            )
        rows = self.call(single).tolist()
        limit = min(max_tokens or self.context_tokens, self.context_tokens)
        lengths = self._lengths(rows)
        cut = (
            sum(length > limit for length in lengths)
            if limit < self.context_tokens
            else self._cut(single, rows, lengths)
        )
        keep_end = max(lengths, default=0) > limit and self._has_end()
        out = []
        for row, length in zip(rows, lengths, strict=True):
            if length > limit:
                kept = [*row[: limit - 1], row[length - 1]] if keep_end else row[:limit]
                row = kept + [self.pad_id] * (len(row) - limit)
            out.append({"input_ids": row, "attention_mask": [int(i < min(length, limit)) for i in range(len(row))]})
        return out, cut

    def _lengths(self, rows: list[list[int]]) -> list[int]:
        return [max((i + 1 for i, t in enumerate(row) if t != self.pad_id), default=1) for row in rows]

    def _cut(self, texts: Sequence[str], rows: list[list[int]], lengths: Sequence[int]) -> int:
        """Count the texts that have more tokens where there is place for one more."""
        # padding may be the end token: then a full row looks one shorter
        full = [i for i, length in enumerate(lengths) if length >= self.context_tokens - 1]
        if self.roomier is None or not full:
            return sum(length == self.context_tokens for length in lengths)
        longer = self.roomier([texts[i] for i in full]).tolist()
        return sum(self._count(more) > self._count(rows[i]) for i, more in zip(full, longer, strict=True))

    def _count(self, row: list[int]) -> int:
        return len(row) - row.count(self.pad_id)

    def _has_end(self) -> bool:
        """Say whether texts end with a token of their own, which the tower may read."""
        rows = self.call(["a", "b"]).tolist()
        return len({row[length - 1] for row, length in zip(rows, self._lengths(rows), strict=True)}) == 1

    def pad(self, encodings: Sequence[Encoding]) -> dict[str, Tensor]:
        """Stack; all rows have one length."""
        return {key: torch.tensor([e[key] for e in encodings], dtype=torch.long) for key in encodings[0]}

    def describe(self) -> dict[str, Any]:
        """Return class and context length."""
        return {"class": type(self.call).__name__, "context_tokens": self.context_tokens, "pad_id": self.pad_id}


def fixed_tokenizer(call: Any, context_tokens: int, pad_id: int = 0) -> FixedTokenizer:
    """Wrap a tokenizer as open_clip has them: a callable (texts, context_length) -> ids (N, L)."""
    # what the tokenizer pads with is what it says; a model's config may differ
    told = getattr(getattr(call, "tokenizer", None), "pad_token_id", None)
    longer = functools.partial(call, context_length=context_tokens + 1)
    return FixedTokenizer(call, context_tokens, pad_id if told is None else int(told), longer)
