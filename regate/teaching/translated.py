"""A teacher whose tokenizer is another than the student's.

It reads the sample's text in its own tokens. A token of the student has the loss of the characters that it stands for,
where a token of the teacher spreads its loss evenly over its own: between tokenizers that agree nothing changes, and
the sum over a text is the same in either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import regate_patch
from model_adapters import Batch, Layout, ModelAdapter
from model_adapters.conventional import text_config
from regate.errors import ConfigError
from regate.labels import IGNORED, predicted
from regate.teaching.teacher import Teacher
from regate.teaching.written import spread, tokenize, write


@dataclass(frozen=True)
class CrossTokenizerTeacher:
    """A text-only language model as the teacher of a student with another tokenizer, for `regate.apply(teacher=...)`.

    Attributes:
        model: a causal language model, placed and in the type in which it shall run; it is frozen.
        tokenizer: its own; one that tells where tokens stand in the text (`is_fast`).
        student_tokenizer: of the model that is trained. Either may be inside a processor.

    Raises:
        ConfigError: something is not what it should be.
    """

    model: nn.Module
    tokenizer: Any
    student_tokenizer: Any

    def __post_init__(self) -> None:
        for name in ("tokenizer", "student_tokenizer"):
            given = getattr(self, name)
            found = getattr(given, "tokenizer", given)
            if not (hasattr(found, "decode") and hasattr(found, "all_special_ids")):
                raise ConfigError(f"CrossTokenizerTeacher.{name} must be a tokenizer, got {type(given).__name__}")
            object.__setattr__(self, name, found)
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"CrossTokenizerTeacher.model must be a model, got {type(self.model).__name__}")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"CrossTokenizerTeacher.tokenizer must tell where its tokens stand in the text, and "
                f"{type(self.tokenizer).__name__} does not; take a fast one, as AutoTokenizer gives where there is one"
            )

    @property
    def agree(self) -> bool:
        """Do both give every token the same number?"""
        return bool(self.tokenizer.get_vocab() == self.student_tokenizer.get_vocab())


class Translated(Teacher):
    """Reference losses of a teacher's tokens, as those of the student's.

    Args:
        given: the teacher and both tokenizers.
        adapter: the teacher's.
        ends: ids of the student that end a text or a turn; the teacher reads its own end there.
        backend, on_unsupported: of the engine.
        waits: see `Teacher`.
    """

    def __init__(
        self,
        given: CrossTokenizerTeacher,
        adapter: ModelAdapter,
        ends: Collection[int],
        *,
        backend: regate_patch.Backend,
        waits: bool = False,
        on_unsupported: regate_patch.OnUnsupported,
    ) -> None:
        model = given.model
        super().__init__(model, adapter, backend=backend, source="given", waits=waits, on_unsupported=on_unsupported)
        self.tokenizer, self.student_tokenizer = given.tokenizer, given.student_tokenizer
        self.ends = {*ends, self.student_tokenizer.eos_token_id} - {None}
        begin = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.begin = [token for token in begin if token is not None][:1]
        self.longest = int(getattr(text_config(model), "max_position_embeddings", None) or 2**31)

    @torch.no_grad()
    def losses(self, batch: Batch, layout: Layout, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Reference losses of the batch's rows (or of `rows`), each [n_labels] float32 on the CPU.

        Labels that stand for no character, or for none that the teacher reads, are guessed evenly: log V. Of a text
        that is longer than the teacher's positions it reads the end.
        """
        chosen = range(len(layout.labels)) if rows is None else list(rows)
        wanted = predicted(layout.labels)
        texts = [self._read(layout, row, wanted[row]) for row in chosen]
        ids = pad_sequence([text.ids for text in texts], batch_first=True, padding_value=self.placeholder())
        labels = pad_sequence([text.labels for text in texts], batch_first=True, padding_value=IGNORED)
        valid = pad_sequence([torch.ones_like(text.ids, dtype=torch.bool) for text in texts], batch_first=True)
        told = Layout(input_ids=ids, labels=labels, valid=valid, visual=torch.zeros_like(valid))
        found = super().losses({"input_ids": ids, "attention_mask": valid.long()}, told)
        unread = math.log(self._vocabulary())
        return [text.translated(losses, unread) for text, losses in zip(texts, found, strict=True)]

    def _read(self, layout: Layout, row: int, wanted: Tensor) -> _Text:
        """A row's text in the teacher's tokens; labels are those that share a character with one of the student's."""
        seen = layout.valid[row] & ~layout.visual[row]
        tokens = torch.where(layout.labels[row] == IGNORED, layout.input_ids[row], layout.labels[row])[seen]
        text = write(self.student_tokenizer, tokens.tolist(), self.ends)
        ids, spans = tokenize(self.tokenizer, text.pieces)
        of_position = np.zeros((len(seen), 2))  # what is not text stands for none
        of_position[seen.numpy()] = text.spans
        asked = of_position[wanted.numpy()]
        ids, spans = ids[-(self.longest - 1) :], spans[-(self.longest - 1) :]
        met = np.zeros(len(ids), bool)
        for begin, end in asked:
            met |= (spans[:, 0] < end) & (np.maximum(spans[:, 1], spans[:, 0] + 1) > begin)
        if not self.begin and len(met):
            met[0] = False  # nothing predicts it
        own = torch.tensor(ids, dtype=torch.long, device="cpu")
        labels = torch.where(torch.from_numpy(met), own, IGNORED)
        begin_ids = torch.tensor(self.begin, dtype=torch.long, device="cpu")
        return _Text(
            ids=torch.cat([begin_ids, own]),
            labels=torch.cat([torch.full_like(begin_ids, IGNORED), labels]),
            spans=spans[met],
            asked=asked,
            characters=text.characters,
        )

    def fingerprint(self) -> dict[str, str]:
        """As every teacher's, and the tokenizers."""
        vocabularies = [sorted(some.get_vocab().items()) for some in (self.tokenizer, self.student_tokenizer)]
        digest = blake2b(json.dumps(vocabularies).encode(), digest_size=16).hexdigest()
        return super().fingerprint() | {"tokenizers": digest}


@dataclass(frozen=True)
class _Text:
    """A sample as the teacher reads it.

    Attributes:
        ids, labels: int64 [m] of the teacher's tokens.
        spans: int64 [l, 2], the characters of its labels.
        asked: float64 [n_labels, 2], those of the student's.
        characters: of the text.
    """

    ids: Tensor
    labels: Tensor
    spans: np.ndarray
    asked: np.ndarray
    characters: int

    def translated(self, losses: Tensor, unread: float) -> Tensor:
        """The student's, of the teacher's `losses` [l]; `unread` where the teacher has none."""
        edges = np.arange(self.characters + 1)
        sums = spread(losses.double().numpy(), self.spans, self.characters)
        read = spread(np.ones(len(self.spans)), self.spans, self.characters)
        of_label = np.diff(np.interp(self.asked, edges, sums), axis=1)[:, 0]
        known = np.diff(np.interp(self.asked, edges, read), axis=1)[:, 0] > 0
        return torch.from_numpy(np.where(known, of_label, unread)).float()
