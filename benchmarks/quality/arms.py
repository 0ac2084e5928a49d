"""What is compared: ways of training from the same weights with the same batches, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import regate
from benchmarks.quality.tasks import Settings

VisualBy = Literal["likeness", "random", "gradient", "change"]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        told: in words, for the page.
        config: changes to `regate.Config.paper()`; None trains without a gate.
        reweighted: grounded words get the share `Settings.grounded_share` of the loss.
        elides: False computes every position and only masks the loss.
        visual_by: which visual tokens stay: the library's choice, by "likeness" to others; drawn at "random"; those
            with the largest "gradient" of the batch's loss, from a pass of its own that is counted as no cost; or, of
            clips, those that "change" most from frame to frame.
        visual_led: samples whose kept labels have larger reference losses keep more of them.
        teacher: None is a copy of the student's language model; a "small" or "large" one has another size.
        samples: the share of the training samples that is used, the more often each.
        wrong: the share of them whose texts are another's.
        longer: how many times as many steps it takes.
    """

    told: str
    config: dict[str, Any] | None = field(default_factory=dict)
    reweighted: bool = False
    elides: bool = True
    visual_by: VisualBy = "likeness"
    visual_led: bool = False
    teacher: Literal["small", "large"] | None = None
    samples: float = 1.0
    wrong: float = 0.0
    longer: int = 1

    def settings(self, run: Settings, seed: int) -> regate.Config:
        """Of its gate; only for arms that have one."""
        common = run.schedule | {"seed": seed, "total_steps": run.steps}
        return regate.Config.paper(**(common | (self.config or {})))


_GUARD = {"guard": 0.1}
_EVEN = {"alignment": "both", "schedule": "interleaved"}  # full samples in every step, a share of each other sample
_BATCH = _EVEN | {"budget": "batch"}  # as recommended
_CYCLED = {"alignment": "both"}  # full steps, in cycles
_HALF, _QUARTER, _TENTH = ({"visual_keep": share} for share in (0.5, 0.25, 0.1))
_SHORT = {"cycle": 8, "full_steps": 1}
_VISIBLE = {"elided": "visible"}

ARMS = {
    "dense": Arm("all tokens, the untouched model", None),
    "exact": Arm("all tokens, with the engine (keep 1)", {"keep": 1.0, "reference_weight": 0.0}),
    "reweighted": Arm("all tokens, grounded words weighted up as ReGATE does", None, reweighted=True),
    # The default.
    "regate": Arm(
        "recommended: m + 0.5 ref, keep 0.5 of the batch, kept tokens computed with their predictors, full samples in "
        "every step",
        _BATCH,
    ),
    "random": Arm("`sample`, but labels at random", _EVEN | {"selection": "random"}),
    "keep25": Arm("recommended, keep 0.25", _BATCH | {"keep": 0.25}),
    "untaught": Arm("recommended, the student's losses alone, no teacher", _BATCH | {"reference_weight": 0.0}),
    # What the default was until the batch had a budget, and what it could have been.
    "sample": Arm("`regate`, but half of each sample's labels", _EVEN),
    "student": Arm("`sample`, the student's losses alone, no teacher", _EVEN | {"reference_weight": 0.0}),
    "reference": Arm("`sample`, reference losses alone", _EVEN | {"student_weight": 0.0, "reference_weight": 1.0}),
    "equal": Arm("`sample`, 0.5 m + 0.5 ref", _EVEN | {"student_weight": 0.5}),
    "gain": Arm(
        "`sample`, ref - m: what the image already explains",
        _EVEN | {"student_weight": -1.0, "reference_weight": 1.0},
    ),
    "gainlate": Arm(
        "`sample`, ref - m, from step 160 on, when the image is read",
        _EVEN | {"student_weight": -1.0, "reference_weight": 1.0, "warmup": 160},
    ),
    "inverse": Arm("`sample`, the least of m + 0.5 ref", _EVEN | {"student_weight": -1.0, "reference_weight": -0.5}),
    "sample25": Arm("`sample`, a quarter of its labels", _EVEN | {"keep": 0.25}),
    "sample75": Arm("`sample`, three quarters of its labels", _EVEN | {"keep": 0.75}),
    "explore": Arm("`sample`, a third of the kept labels at random", _EVEN | {"explore": 1 / 3}),
    "full2": Arm("`sample`, 1 full sample in 16", _EVEN | {"full_steps": 2}),
    "full8": Arm("`sample`, 1 full sample in 4", _EVEN | {"full_steps": 8}),
    "lastfull": Arm("`sample`, the last 40 steps full", _EVEN | {"final_full_steps": 40}),
    "guarded": Arm("`sample`, with a guard at 0.1", _EVEN | _GUARD),
    "masking": Arm("the choice of `sample`, loss masking alone", _EVEN, elides=False),
    "visible": Arm("`sample`, what is left out visible", _EVEN | _VISIBLE),
    "teacher-small": Arm("`sample`, with a teacher of one layer, a quarter as wide", _EVEN, teacher="small"),
    "teacher-large": Arm("`sample`, with a teacher twice as deep and as wide", _EVEN, teacher="large"),
    # Several epochs.
    "few-dense": Arm("all tokens, a fifth of the samples five times as often", None, samples=0.2),
    "few-sample": Arm("`sample`, a fifth of the samples five times as often", _EVEN, samples=0.2),
    "few-random": Arm(
        "`random`, a fifth of the samples five times as often",
        _EVEN | {"selection": "random"},
        samples=0.2,
    ),
    # Data as it is gathered: of every fifth sample, text and image do not belong together.
    "wrong-dense": Arm("all tokens, a fifth of the samples with another's text", None, wrong=0.2),
    "wrong-regate": Arm("recommended, a fifth of the samples with another's text", _BATCH, wrong=0.2),
    "wrong-sample": Arm("`sample`, a fifth of the samples with another's text", _EVEN, wrong=0.2),
    "wrong-random": Arm(
        "`random`, a fifth of the samples with another's text", _EVEN | {"selection": "random"}, wrong=0.2
    ),
    # Until dense training, too, has learnt what it will.
    "long-dense": Arm("all tokens, twice as many steps", None, longer=2),
    "long-sample": Arm("`sample`, twice as many steps", _EVEN, longer=2),
    # Full steps, and between them sparse ones.
    "cycled": Arm("`sample`, but in cycles: full steps instead of full samples", _CYCLED),
    "cycled-random": Arm("in cycles, as many labels at random", _CYCLED | {"selection": "random"}),
    "cycled-keep25": Arm("in cycles, keep 0.25", _CYCLED | {"keep": 0.25}),
    "cycled-keep25-guarded": Arm("in cycles, keep 0.25, with a guard at 0.1", _CYCLED | {"keep": 0.25} | _GUARD),
    "cycled-keep75": Arm("in cycles, keep 0.75", _CYCLED | {"keep": 0.75}),
    "cycled-visible": Arm("in cycles, what is left out visible", _CYCLED | _VISIBLE),
    "short": Arm("in short cycles: one full step in 8", _CYCLED | _SHORT),
    # Fewer visual tokens.
    "visual50-visible": Arm(
        "`sample`, 50% of visual tokens of samples that are not full, what is left out visible",
        _EVEN | _HALF | _VISIBLE,
    ),
    "visual25-visible": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, what is left out visible",
        _EVEN | _QUARTER | _VISIBLE,
    ),
    "visual25-visible-random": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, drawn at random, what is left out visible",
        _EVEN | _QUARTER | _VISIBLE,
        visual_by="random",
    ),
    "visual25-visible-gradient": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, those with the largest gradient in a pass of "
        "its own, what is left out visible",
        _EVEN | _QUARTER | _VISIBLE,
        visual_by="gradient",
    ),
    "visual25-visible-led": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, more of those whose kept labels have larger "
        "reference losses, what is left out visible",
        _EVEN | _QUARTER | _VISIBLE,
        visual_led=True,
    ),
    "visual10-visible": Arm(
        "`sample`, 10% of visual tokens of samples that are not full, what is left out visible",
        _EVEN | _TENTH | _VISIBLE,
    ),
    # The same, hidden.
    "visual25": Arm("`sample`, 25% of visual tokens of samples that are not full", _EVEN | _QUARTER),
    "visual25-random": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, drawn at random",
        _EVEN | _QUARTER,
        visual_by="random",
    ),
    "visual25-change": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, those that change most from frame to frame",
        _EVEN | _QUARTER,
        visual_by="change",
    ),
    "visual25-led": Arm(
        "`sample`, 25% of visual tokens of samples that are not full, more of those whose kept labels have larger "
        "reference losses",
        _EVEN | _QUARTER,
        visual_led=True,
    ),
    "cycled-visual50": Arm("in cycles, 50% of visual tokens on sparse steps", _CYCLED | _HALF),
    "cycled-visual50-lastfull": Arm(
        "in cycles, 50% of visual tokens on sparse steps, the last 40 steps full",
        _CYCLED | _HALF | {"final_full_steps": 40},
    ),
    "cycled-visual50-random": Arm(
        "in cycles, 50% of visual tokens on sparse steps, drawn at random", _CYCLED | _HALF, visual_by="random"
    ),
    "cycled-visual50-visible": Arm(
        "in cycles, 50% of visual tokens on sparse steps, what is left out visible", _CYCLED | _HALF | _VISIBLE
    ),
    "cycled-visual25-visible": Arm(
        "in cycles, 25% of visual tokens on sparse steps, what is left out visible", _CYCLED | _QUARTER | _VISIBLE
    ),
    "short-visual25-visible": Arm(
        "in short cycles, 25% of visual tokens on sparse steps, what is left out visible",
        _CYCLED | _SHORT | _QUARTER | _VISIBLE,
    ),
    # The paper's: predictors of kept labels alone are computed, in cycles.
    "paper": Arm("the paper's: predictors of kept labels alone, in cycles"),
    "paper-random": Arm("the paper's, as many labels at random", {"selection": "random"}),
    "paper-student": Arm("the paper's, the student's losses alone, no teacher", {"reference_weight": 0.0}),
    "paper-reference": Arm("the paper's, reference losses alone", {"student_weight": 0.0, "reference_weight": 1.0}),
    "paper-equal": Arm("the paper's, 0.5 m + 0.5 ref", {"student_weight": 0.5}),
    "paper-gain": Arm("the paper's, ref - m", {"student_weight": -1.0, "reference_weight": 1.0}),
    "paper-full8": Arm("the paper's, 8 full steps in a cycle of 32", {"full_steps": 8}),
    "paper-interleaved": Arm(
        "the paper's, as many full samples in every step instead of full steps", {"schedule": "interleaved"}
    ),
    "paper-lastfull": Arm("the paper's, the last 40 steps full", {"final_full_steps": 40}),
    "paper-masking": Arm("the paper's choice, loss masking alone", elides=False),
}
