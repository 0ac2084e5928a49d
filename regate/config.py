"""The settings of the method, in one frozen dataclass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch import Tensor

from regate.errors import ConfigError

Schedule = Literal["cycled", "interleaved"]
Selection = Literal["score", "random"]
Alignment = Literal["predictor", "both"]
Elided = Literal["hidden", "visible"]
Logits = Literal["kept", "all"]
Budget = Literal["sample", "batch"]
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to gate. Defaults are the paper's (arXiv 2507.21420, section 3 and appendix), but for `schedule`, `budget`
    and `alignment`, which follow docs/evidence.md; `Config.paper()` has all of the paper's.

    Attributes:
        full_steps, cycle: how much keeps every label, so many in each of so many: of samples or of optimizer steps, by
            the `schedule`; 0 <= full_steps <= cycle.
        keep: share of the labels kept on the other, sparse steps; 0 < keep <= 1.
        budget: what `keep` is a share of, all labels of one forward of one process ("batch"), so that samples with much
            to learn keep more, and each keeps one at least; or each sample's own ("sample"), as in the paper. It is
            each sample's own, too, where rows cannot be laid end to end, because the one that keeps most would make
            all as long.
        warmup: full steps at the beginning.
        final_full_steps: full steps at the end of training; needs `total_steps`.
        total_steps: optimizer steps of the whole run, or None.
        schedule: what keeps every label after warm-up, some samples of each step ("interleaved") or all samples of some
            steps ("cycled"). "interleaved": in every step the share `full_steps / cycle` of the samples keeps every
            label, each sample in its turn (`regate.scoring.turns`), and the others keep their share. Steps cost the
            same, and of n rows at a time `ceil(n * full_steps / cycle)` are full, which lowers the peak of memory.
            Where rows cannot be laid end to end, that share of forwards is full instead. "cycled", the paper's: the
            first `full_steps` optimizer steps of each `cycle` are full, the others sparse, which learned worse on one
            task of two (docs/evidence.md).
        ema_decay: beta of the difficulty's moving average, `m <- beta*m + (1-beta)*loss`.
        student_weight, reference_weight: a label's score is `student_weight*m + reference_weight*ref`. Of either sign:
            -1 and 1 score what the visual input already explains, `ref - m`.
        score: a function in the place of that sum, of m, ref and the prior (the student's average loss on that
            vocabulary token, which stands for m, too, where a sample was not seen yet): each float32 [N, L] on the CPU,
            N samples, read at their labels. It returns scores [N, L]; the highest are kept. Without a teacher
            (`reference_weight=0`) ref is 0.
        selection: "score" keeps the highest scores, "random" as many at random (a control).
        alignment: which answer positions a kept label activates: "both" its predictor and the kept token itself, or
            the "predictor" alone, as in the paper. That computes fewer positions, but words that follow do not see what
            was kept: it learned worse in cycles, and was not told apart with full samples in every step
            (docs/evidence.md).
        explore: share of the kept labels that is drawn at random, among those that the score leaves out.
        seed: of what is drawn at random.
        elided: what the computed positions of a sparse step see of those that are left out. "hidden" is nothing, as in
            the paper. With "visible" they attend to them as they are in front of the first layer, for which each layer
            makes their keys and values: little work where heads share these (grouped-query attention).
        visual_keep: share of a sample's visual tokens computed on sparse steps; 0 < visual_keep <= 1. Those left out
            have embeddings most like another's (see `regate.scoring.visual`). Hiding them costs quality; with
            elided="visible" computing a quarter of them cost 1.3 points of accuracy (docs/evidence.md).
        guard: how many nats the mean loss of the easiest labels, which sparse steps leave out, may rise above the
            lowest it was; beyond, steps are full until half of that is gone, a `cycle` at most, and the report says so
            (`regate.scoring.guard`). None does not look. It is read off samples that keep every label, so
            `full_steps` must not be 0, and only where the easiest are what is left out: by a sum with a positive
            `student_weight`. While it is open, steps take the memory of full ones.
        logits: where training forwards compute them: at positions that predict "kept" labels, a chunk at a time, or,
            which takes more time and memory, at "all". With "kept" the loss and its gradients are the same up to
            rounding, and reading `outputs.logits` is an error that names this setting; with "all" full steps run the
            model as it is.
        disable: passes of the engine that only save work, to be left out by name while debugging (`docs/engine.md`).

    Raises:
        ConfigError: a value out of its range, or of another kind.
    """

    cycle: int = 128
    full_steps: int = 16
    keep: float = 0.5
    budget: Budget = "batch"
    warmup: int = 100
    final_full_steps: int = 0
    total_steps: int | None = None
    schedule: Schedule = "interleaved"
    ema_decay: float = 0.9
    student_weight: float = 1.0
    reference_weight: float = 0.5
    score: Score | None = None
    selection: Selection = "score"
    explore: float = 0.0
    alignment: Alignment = "both"
    seed: int = 0
    elided: Elided = "hidden"
    visual_keep: float = 1.0
    guard: float | None = None
    logits: Logits = "kept"
    disable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("cycle", "full_steps", "warmup", "final_full_steps", "seed")
        self._require_all(
            (*counts, *(() if self.total_steps is None else ("total_steps",))), Integral, "a whole number"
        )
        numbers = ("keep", "ema_decay", "student_weight", "reference_weight", "explore", "visual_keep")
        self._require_all(numbers, Real, "a number")
        self._require("cycle", self.cycle >= 1, "at least 1")
        self._require("full_steps", 0 <= self.full_steps <= self.cycle, f"in [0, cycle={self.cycle}]")
        self._require("schedule", self.schedule in get_args(Schedule), f"one of {get_args(Schedule)}")
        self._require("keep", 0 < self.keep <= 1, "in (0, 1]")
        self._require("budget", self.budget in get_args(Budget), f"one of {get_args(Budget)}")
        self._require("warmup", self.warmup >= 0, "at least 0")
        self._require("final_full_steps", self.final_full_steps >= 0, "at least 0")
        if self.final_full_steps:
            self._require("total_steps", (self.total_steps or 0) >= self.final_full_steps, "given and not smaller "
                          "than final_full_steps")  # fmt: skip
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self._require("student_weight", math.isfinite(self.student_weight), "finite")
        self._require("reference_weight", math.isfinite(self.reference_weight), "finite")
        if self.student_weight == 0:
            self._require("reference_weight", self.reference_weight != 0, "other than 0 where student_weight is 0")
        self._require("score", self.score is None or _takes_three(self.score), "a function of m, ref and the prior")
        self._require("explore", 0 <= self.explore <= 1, "in [0, 1]")
        self._require("selection", self.selection in get_args(Selection), f"one of {get_args(Selection)}")
        self._require("alignment", self.alignment in get_args(Alignment), f"one of {get_args(Alignment)}")
        self._require("elided", self.elided in get_args(Elided), f"one of {get_args(Elided)}")
        self._require("visual_keep", 0 < self.visual_keep <= 1, "in (0, 1]")
        if self.guard is not None:
            self._require_all(("guard",), Real, "a number")
            self._require("guard", 0 < self.guard < math.inf, "more than 0 and finite")
            self._require("guard", self.full_steps > 0, "None where full_steps is 0, for nothing would tell")
            easiest = self.keep < 1 and self.selection == "score" and self.score is None and self.student_weight > 0
            self._require("guard", easiest, "None where other labels are left out than those that are easiest by m")
        self._require("logits", self.logits in get_args(Logits), f"one of {get_args(Logits)}")
        several = isinstance(self.disable, Collection) and not isinstance(self.disable, str)
        named = several and all(isinstance(name, str) for name in self.disable)
        self._require("disable", named, "a tuple of names of passes, such as ('tail',)")

    def _require_all(self, fields: Iterable[str], kind: type, allowed: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self._require(field, isinstance(value, kind) and not isinstance(value, bool), allowed)

    def _require(self, field: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"Config.{field} must be {allowed}, got {getattr(self, field)!r}")

    @classmethod
    def paper(cls, **changes: Any) -> Config:
        """The paper's settings, whatever the defaults become."""
        settings: dict[str, Any] = {
            "cycle": 128, "full_steps": 16, "schedule": "cycled", "keep": 0.5, "budget": "sample", "warmup": 100,
            "final_full_steps": 0, "ema_decay": 0.9, "student_weight": 1.0, "reference_weight": 0.5, "score": None,
            "selection": "score", "explore": 0.0, "alignment": "predictor", "elided": "hidden", "visual_keep": 1.0,
            "guard": None,
        }  # fmt: skip
        return cls(**(settings | changes))

    @classmethod
    def exact(cls, **changes: Any) -> Config:
        """Every step learns from every label, with dense training's gradients; what no loss reads is left out.

        Raises:
            ConfigError: a share of labels or of visual tokens that is to be left out.
        """
        for name in ("keep", "visual_keep"):
            if (share := changes.get(name, 1)) != 1:
                raise ConfigError(
                    f"Config.exact leaves out no label and no visual token, so {name} is 1, got {share!r}; "
                    f"regate.Config({name}={share!r}) leaves some out"
                )
        settings: dict[str, Any] = {"keep": 1.0, "visual_keep": 1.0}
        return cls(**(settings | changes))

    @property
    def uses_references(self) -> bool:
        """Does it depend on reference losses which labels are kept?"""
        return self.keep < 1 and self.selection == "score" and self.reference_weight != 0

    @property
    def leaves_out(self) -> bool:
        """Do sparse steps leave out labels or visual tokens?"""
        return self.keep < 1 or self.visual_keep < 1

    @property
    def shows(self) -> bool:
        """Is what they leave out seen?"""
        return self.elided == "visible" and self.leaves_out

    @property
    def first_sparse(self) -> int | None:
        """The first optimizer step that leaves something out, in a run long enough; None where none does."""
        if not self.leaves_out or self.full_steps == self.cycle:
            return None
        return self.warmup + (self.full_steps if self.schedule == "cycled" else 0)

    def is_full(self, step: int) -> bool:
        """Does optimizer step `step` (from 0) keep every label?"""
        return self.full_share(step) == 1

    def full_share(self, step: int) -> float:
        """Of the samples of optimizer step `step` (from 0), the share that keeps every label."""
        if step < self.warmup or not self.leaves_out:
            return 1.0
        if self.total_steps is not None and step >= self.total_steps - self.final_full_steps:
            return 1.0
        if self.schedule == "interleaved":
            return self.full_steps / self.cycle
        return float((step - self.warmup) % self.cycle < self.full_steps)


def _takes_three(function: object) -> bool:
    """Can it be called with three arguments? Of what cannot be asked, such as a builtin, its first call tells."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # it tells no signature
        return True
    return True
