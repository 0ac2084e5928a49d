"""One caption per image of easy-VQA, from its published questions (colour, shape) and pixels (place).

The images are drawings and the captions are ours. What is grounded in the image: colour, shape and
place where they are first named. The rest a text-only model can learn to predict, later mentions of the same
words included.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import easy_vqa
import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ROWS, COLUMNS = ("upper", "lower"), ("left", "right")
KINDS = (COLOURS, SHAPES, ROWS, COLUMNS)
CLASSES = tuple(map(len, KINDS))  # of the facts of a picture
PROMPT = "describe the picture"
_TEMPLATES = (
    "there is one {colour} {shape} on a plain background , in the {row} {column} corner of the picture "
    ". nothing else can be seen besides this {colour_} {shape_} .",
    "the picture shows one {colour} {shape} that lies in the {row} {column} corner of it . "
    "the background of this {colour_} {shape_} is plain , and there is nothing else on it .",
)


@dataclass(frozen=True)
class Caption:
    """An image and its caption: `words`, and for each whether only the image tells it."""

    image: str
    words: tuple[str, ...]
    grounded: tuple[bool, ...]

    @property
    def facts(self) -> tuple[int, ...]:
        """What the picture shows, one class of each of `CLASSES`: the grounded words, each once."""
        told = [word for word, is_grounded in zip(self.words, self.grounded, strict=True) if is_grounded]
        return tuple(next(kind.index(word) for word in told if word in kind) for kind in KINDS)

    def record(self) -> dict[str, Any]:
        """As a conversation (see `examples.conversations`)."""
        question = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        answer = [{"type": "text", "text": " ".join(self.words)}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "images": [self.image]}


def load(*, validation: int = 400, seed: int = 0) -> dict[str, list[Caption]]:
    """Captions of "train", "validation" (carved out of train) and "test"."""
    train = _captions(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    test = _captions(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
    random.Random(seed).shuffle(train)
    return {"train": train[validation:], "validation": train[:validation], "test": test}


def _captions(questions: tuple[list[str], list[str], list[int]], paths: dict[int, str]) -> list[Caption]:
    known: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, image in zip(*questions, strict=True):
        if not question.startswith("what"):
            continue  # yes/no questions also name absent things
        for word in [answer, *question.strip("?").split()]:
            if word in COLOURS:
                known[image]["colour"] = word
            elif word in SHAPES:
                known[image]["shape"] = word
    return [_caption(paths[i], facts, i) for i, facts in sorted(known.items()) if len(facts) == 2]


def _caption(path: str, facts: dict[str, str], number: int) -> Caption:
    row, column = _corner(path)
    values = {**facts, "row": row, "column": column}
    words, grounded = [], []
    for word in random.Random(number).choice(_TEMPLATES).split():
        name = word.strip("{}")
        is_slot = name != word
        words.append(values[name.rstrip("_")] if is_slot else word)
        grounded.append(is_slot and not name.endswith("_"))
    return Caption(path, tuple(words), tuple(grounded))


def _corner(path: str) -> tuple[str, str]:
    """The corner that the drawing's centre is nearest to."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1) > 60)
    height, width = pixels.shape[:2]
    return ROWS[int(rows.mean() >= height / 2)], COLUMNS[int(columns.mean() >= width / 2)]
