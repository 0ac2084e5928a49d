"""Tokens as the text that they stand for: which characters are each token's, whatever the tokenizer.

Two tokenizers meet in the characters. A loss per token of one becomes a loss per token of the other if each token's
loss is spread evenly over its characters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

_UNFINISHED = "\ufffd"  # what tokens are decoded to that hold a part of a character
_END = "\0"  # stands for the token that ends a text or a turn, one character in either tokenizer


@dataclass(frozen=True)
class Written:
    """Tokens and their text.

    Attributes:
        pieces: the text in order, in pieces between special tokens; the end token is a piece of its own.
        spans: float64 [n, 2], where each token's characters begin and end; the same for one that stands for none.
            Tokens that make a character together have a share of it each.
    """

    pieces: tuple[str, ...]
    spans: np.ndarray

    @property
    def characters(self) -> int:
        return sum(map(len, self.pieces))


def write(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> Written:
    """The text of `ids`; special tokens that are none of `ends` stand for none."""
    silent = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    silent |= set(tokenizer.all_special_ids)
    pieces: list[str] = []
    spans: list[tuple[float, float]] = []
    at = 0.0

    def kind(token: int) -> str:
        return "end" if token in ends else "silent" if token in silent else "text"

    for what, some in groupby(ids, kind):
        run = list(some)
        shares = list(_shares(tokenizer, run)) if what == "text" else [("", 0.0)] * len(run)
        if what == "end":
            shares = [(_END, 1.0)] * len(run)
            pieces.extend(_END * len(run))
        elif what == "text":
            pieces.append("".join(text for text, _ in shares))
        for text, share in shares:
            end = at + share if share and not text else float(round(at + share))  # thirds do not add up
            spans.append((at, end))
            at = end
    return Written(tuple(piece for piece in pieces if piece), np.asarray(spans, float).reshape(-1, 2))


def _shares(tokenizer: Any, ids: list[int]) -> Iterator[tuple[str, float]]:
    """For each token the text that it completes, and how many characters are its own.

    Decoded a few at a time: what a token adds depends on the one before it (blanks), and on nothing farther.
    """

    def decoded(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before = first = 0  # of the tokens that were decoded last, and of those that wait for the rest of a character
    for i in range(len(ids)):
        known, now = decoded(ids[before:first]), decoded(ids[before : i + 1])
        if now.endswith(_UNFINISHED) and i + 1 < len(ids):
            continue
        added = now[len(known) :]
        together = i + 1 - first
        yield from [("", len(added) / together)] * (together - 1)
        yield added, len(added) / together
        if added or together > 1:
            before = first
        first = i + 1


def tokenize(tokenizer: Any, pieces: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """The text as this tokenizer has it.

    Returns:
        ids, and int64 [n, 2], the first character of each and the one behind its last.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        if piece == _END and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            spans.append((at, at + 1))
        elif piece != _END:
            found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids.extend(found["input_ids"])
            spans.extend((at + begin, at + end) for begin, end in found["offset_mapping"])
        at += len(piece)
    return ids, np.asarray(spans, int).reshape(-1, 2)


def spread(losses: np.ndarray, spans: np.ndarray, characters: int) -> np.ndarray:
    """The sum of `losses` [n] up to each character, float64 [characters + 1], where each has its token's even share.

    A token without characters, as one that is the middle of one, gives its loss to the next.
    """
    density = np.zeros(characters + 1)
    for loss, (begin, end) in zip(losses.tolist(), spans.tolist(), strict=True):
        density[begin : max(end, begin + 1)] += loss / max(end - begin, 1)
    return np.concatenate([[0.0], np.cumsum(density[:characters])])
