"""What an entry of a call may be, by its name alone: of labels, of images, of positions, a number, a setting."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from regate.labels import IGNORED

_NAMES = re.compile(r"label|target")
_WEIGHS = re.compile(r"weight|loss|completion_mask|assistant|advantage|reward")
_COUNTS = re.compile(
    r"^(num|n|total|count|valid|avg|average|mean|global|local)_\w*(items|tokens|labels|targets)"
    r"|(item|token|label|target)s?_(count|counts|num|sum|total)$|denominator|normali[sz]er|divisor"
)
_DIVIDES = re.compile(r"items|denominator|normali[sz]er|divisor|^(avg|average|mean)_")  # of them, whatever its value
# Of what is no label's: numbers that count none, and weights of other things.
_SETTINGS = re.compile(r"(^|_)(max|min)(imum)?(_|$)|keep|step|epoch|size|scale|seed|layer|beam|class|temperature|_id$")
_OF_POSITIONS = re.compile(r"type|position|seq|length")  # what they are called, and masks of them
_OF_IMAGES = re.compile(r"image|img|video|audio|visual|vision|pixel|patch|frame|tile")
_OF_PARTS = re.compile(r"(^|_)(grids?|rope|query|queries|memory|latents?|registers?)(_|$)")  # of models; as numbers
_READ = re.compile(r"_ids?$|types?$|attention|attn|segment|cache|embed|pixel")  # by decoders, whatever it says

_Counting = Literal["yes", "if not too small", "as long as it was", "no"]
_Lies = Literal["must", "if it can", "if it says so", "if at all", "if alike at all", "no"]


@dataclass(frozen=True)
class Name:
    """What an entry of a call may be, by its name alone.

    Attributes:
        of_others: is it of images, or of a part of the model?
        holds: may a dict of this name hold entries of labels?
        counts: is one number of this name theirs? "if not too small": one far below that of labels is of something
            else. "as long as it was": it, or one for each row, is while it has been their number in every call.
        lies: does a tensor of about as many entries lie along labels? By its name it "must", and is refused where it
            cannot; "if it can", and is of a part of the model where it cannot. Else what it says tells: by itself ("if
            it says so"); only if it says something at all labels ("if at all"), as for names of images; or only if
            that is also the same at all of them ("if alike at all"), as for names of positions.
        weighs: is what is no tensor along labels refused, such as lists?
        nothing: what integers of this name say where they say nothing; others say 0.
        shifted: does it lie at predictors, whatever it says?
    """

    of_others: bool
    holds: bool
    counts: _Counting
    lies: _Lies
    weighs: bool
    nothing: int
    shifted: bool


@functools.cache
def of_name(name: str) -> Name:
    """The one place where the words of names are weighed against each other."""
    names, weighs, counts, setting, positions, images, parts, read = (
        words.search(name) is not None
        for words in (_NAMES, _WEIGHS, _COUNTS, _SETTINGS, _OF_POSITIONS, _OF_IMAGES, _OF_PARTS, _READ)
    )
    part = parts and not names
    lies: _Lies
    if (names or weighs) and not images:
        lies = "if it can" if part else "must"
    elif read:
        lies = "no"
    elif images:
        lies = "if at all"
    else:
        lies = "if alike at all" if positions else "if it says so"
    if images or part or (not counts and (setting or positions or read)):
        told: _Counting = "no"
    elif counts:
        told = "yes" if _DIVIDES.search(name) else "if not too small"
    else:
        told = "as long as it was"
    return Name(
        of_others=images or part,
        holds=not (images or read),
        counts=told,
        lies=lies,
        weighs=weighs and not (images or part or setting),
        nothing=IGNORED if names else 0,
        shifted=name.startswith("shift"),
    )


def is_of_others(name: str) -> bool:
    """Is what is called so of images, or of a part of the model? There may be as many of these as rows by chance."""
    return of_name(name).of_others
