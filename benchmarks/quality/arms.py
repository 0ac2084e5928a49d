"""What is compared: ways of training from the same weights with the same batches, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import regate
from benchmarks.quality.tasks import Settings


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        told: in words, for the page.
        config: changes to `regate.Config.paper()`; None trains without a gate.
        reweighted: grounded words get the share `Settings.grounded_share` of the loss.
        elides: False computes every position and only masks the loss.
        visual_at_random: visual tokens are left out at random, not by what they look like.
    """

    told: str
    config: dict[str, Any] | None = field(default_factory=dict)
    reweighted: bool = False
    elides: bool = True
    visual_at_random: bool = False

    @property
    def taught(self) -> bool:
        """Does its score need reference losses?"""
        if self.config is None or self.config.get("selection") == "random" or self.config.get("keep") == 1.0:
            return False
        return bool(self.config.get("reference_weight", 0.5) != 0)

    def settings(self, run: Settings, seed: int) -> regate.Config:
        """Of its gate; only for arms that have one."""
        common = run.schedule | {"seed": seed, "total_steps": run.steps}
        return regate.Config.paper(**(common | (self.config or {})))


ARMS = {
    "dense": Arm("all tokens, the untouched model", None),
    "exact": Arm("all tokens, with the engine (keep 1)", {"keep": 1.0, "reference_weight": 0.0}),
    "regate": Arm(
        "the default: m + 0.5 ref, keep 0.5, kept tokens computed with their predictors", {"alignment": "both"}
    ),
    "paper": Arm("the paper's: predictors of kept labels alone"),
    "random": Arm("the paper's, as many labels at random", {"selection": "random"}),
    "randomboth": Arm("the default, as many labels at random", {"selection": "random", "alignment": "both"}),
    "reweighted": Arm("all tokens, grounded words weighted up as ReGATE does", None, reweighted=True),
    "student": Arm("the student's losses alone, no teacher", {"reference_weight": 0.0}),
    "reference": Arm("reference losses alone", {"student_weight": 0.0, "reference_weight": 1.0}),
    "gain": Arm("ref - m, what the image already explains", {"student_weight": -1.0, "reference_weight": 1.0}),
    "explore": Arm("the paper's, a third of the kept labels at random", {"explore": 1 / 3}),
    "equal": Arm("0.5 m + 0.5 ref", {"student_weight": 0.5}),
    "keep25": Arm("the default, keep 0.25", {"keep": 0.25, "alignment": "both"}),
    "keep75": Arm("the default, keep 0.75", {"keep": 0.75, "alignment": "both"}),
    "budget": Arm("the default, the most worth keeping of the whole batch", {"budget": "batch", "alignment": "both"}),
    "budget25": Arm(
        "keep 0.25, the most worth keeping of the whole batch", {"budget": "batch", "keep": 0.25, "alignment": "both"}
    ),
    "inverse": Arm("the least of m + 0.5 ref", {"student_weight": -1.0, "reference_weight": -0.5}),
    "gainlate": Arm(
        "ref - m, from step 160 on, when the image is read",
        {"student_weight": -1.0, "reference_weight": 1.0, "warmup": 160},
    ),
    "full2": Arm("the paper's, 2 full steps in a cycle of 32", {"full_steps": 2}),
    "full8": Arm("the paper's, 8 full steps in a cycle of 32", {"full_steps": 8}),
    "interleaved": Arm(
        "the paper's, as many full samples in every step instead of full steps", {"schedule": "interleaved"}
    ),
    "interleavedboth": Arm(
        "the default, as many full samples in every step instead of full steps",
        {"schedule": "interleaved", "alignment": "both"},
    ),
    "lastfull": Arm("the paper's, the last 40 steps full", {"final_full_steps": 40}),
    "lastfullboth": Arm("the default, the last 40 steps full", {"final_full_steps": 40, "alignment": "both"}),
    "visual75": Arm("the default, 75% of visual tokens on sparse steps", {"visual_keep": 0.75, "alignment": "both"}),
    "visual50": Arm("the default, 50% of visual tokens on sparse steps", {"visual_keep": 0.5, "alignment": "both"}),
    "visual50lastfull": Arm(
        "the default, 50% of visual tokens on sparse steps, the last 40 steps full",
        {"visual_keep": 0.5, "final_full_steps": 40, "alignment": "both"},
    ),
    "visual25": Arm("the default, 25% of visual tokens on sparse steps", {"visual_keep": 0.25, "alignment": "both"}),
    "visual50random": Arm(
        "the default, 50% of visual tokens on sparse steps, drawn at random",
        {"visual_keep": 0.5, "alignment": "both"},
        visual_at_random=True,
    ),
    "visible": Arm("the default, what is left out visible", {"elided": "visible", "alignment": "both"}),
    "visual50visible": Arm(
        "the default, 50% of visual tokens on sparse steps, what is left out visible",
        {"visual_keep": 0.5, "elided": "visible", "alignment": "both"},
    ),
    "visual25visible": Arm(
        "the default, 25% of visual tokens on sparse steps, what is left out visible",
        {"visual_keep": 0.25, "elided": "visible", "alignment": "both"},
    ),
    "visual10visible": Arm(
        "the default, 10% of visual tokens on sparse steps, what is left out visible",
        {"visual_keep": 0.1, "elided": "visible", "alignment": "both"},
    ),
    "visual25visiblerandom": Arm(
        "the default, 25% of visual tokens on sparse steps, drawn at random, what is left out visible",
        {"visual_keep": 0.25, "elided": "visible", "alignment": "both"},
        visual_at_random=True,
    ),
    "masking": Arm("the paper's choice, loss masking alone", elides=False),
}
