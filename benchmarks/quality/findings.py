"""Sentences that follow from the figures, each with its verdict."""

from __future__ import annotations

from benchmarks.quality import analysis
from benchmarks.quality.analysis import Difference, Part, Record
from benchmarks.quality.markdown import shown
from benchmarks.quality.summary import ENOUGH, FEW, MARGIN

PAIRS = (
    ("regate", "random", "at equal budget"),
    ("sample", "random", "at equal budget"),
    ("cycled", "cycled-random", "at equal budget"),
    ("paper", "paper-random", "at equal budget"),
    ("regate", "reweighted", "which has as much of the loss on grounded words and leaves nothing out"),
    ("sample", "reweighted", "which has as much of the loss on grounded words and leaves nothing out"),
    ("regate", "sample", "for a budget of the batch"),
    ("keep25", "sample25", "for a budget of the batch"),
    ("keep25", "regate", "for half as many labels"),
    ("regate", "untaught", "so what the reference adds"),
    ("sample", "reference", "so what the student's own losses add"),
    ("sample", "student", "so what the reference adds"),
    ("paper", "paper-student", "so what the reference adds"),
    ("equal", "sample", "for the formula's other reading"),
    ("inverse", "sample", "for the least of the score"),
    ("gain", "sample", "for ref - m"),
    ("gainlate", "sample", "for ref - m once the image is read"),
    ("explore", "sample", "for labels at random among those kept"),
    ("full2", "sample", "for half as many full samples"),
    ("full8", "sample", "for twice as many full samples"),
    ("lastfull", "sample", "for full steps at the end"),
    ("sample25", "sample", "for half as many labels"),
    ("sample75", "sample", "for half as many more labels"),
    ("visible", "sample", "for seeing what is left out"),
    ("sample", "masking", "the same choice with every position computed, so what leaving positions out costs"),
    ("paper", "paper-masking", "the same choice with every position computed, so what leaving positions out costs"),
    ("cycled", "paper", "for the kept tokens' own positions"),
    ("sample", "paper-interleaved", "for the kept tokens' own positions"),
    ("sample", "cycled", "for full samples in every step instead of full steps"),
    ("short", "cycled", "for one full step in 8 instead of 4 in 32"),
    ("short", "sample", "for full steps, if often, instead of full samples"),
    ("paper-interleaved", "paper", "for full samples in every step instead of full steps"),
    ("cycled-visual50-lastfull", "cycled-visual50", "for full steps at the end"),
    ("cycled-visual50-visible", "cycled-visual50", "for seeing what is left out"),
    ("cycled-visual25-visible", "cycled-visual50", "the same with half as many"),
    ("cycled-visual50-random", "cycled-visual50", "for drawing them at random"),
    ("visual25-visible", "sample", "for a quarter of the visual tokens"),
    ("visual25-visible", "visual25-visible-random", "for not drawing them at random"),
    ("visual25-visible-gradient", "visual25-visible", "for taking those with the largest gradient"),
    ("visual25-visible-led", "visual25-visible", "for more of samples that need them"),
    ("visual25", "visual25-random", "for not drawing them at random"),
    ("visual25-change", "visual25", "for taking those that change from frame to frame"),
    ("visual25-led", "visual25", "for more of samples that need them"),
    ("sample", "teacher-small", "what a teacher of the student's size is worth"),
    ("teacher-large", "sample", "for a larger teacher"),
    ("long-sample", "long-dense", "over twice as many steps"),
    ("few-dense", "dense", "for a fifth of the samples five times as often"),
    ("few-sample", "few-dense", "over five times as many epochs"),
    ("few-sample", "few-random", "over five times as many epochs, at equal budget"),
    ("wrong-dense", "dense", "for a fifth of the texts being another sample's"),
    ("wrong-regate", "wrong-dense", "over data of which a fifth is wrong"),
    ("wrong-sample", "wrong-dense", "over data of which a fifth is wrong"),
    ("wrong-random", "wrong-dense", "over data of which a fifth is wrong"),
    ("wrong-regate", "wrong-sample", "over data of which a fifth is wrong, for a budget of the batch"),
    ("short-visual25-visible", "short", "for a quarter of the visual tokens"),
    ("short-visual25-visible", "cycled-visual25-visible", "for full steps more often"),
)


def against_dense(runs: list[Record], arms: list[str], part: Part) -> str:
    """A sentence an arm."""
    found = {arm: analysis.paired(runs, arm, analysis.final("grounded", part)) for arm in arms if arm != "dense"}
    return "\n".join(f"- **{arm}**: {_told(difference, 'dense')}." for arm, difference in found.items() if difference)


def comparisons(runs: list[Record], arms: list[str], part: Part) -> str:
    """A sentence for each two arms that differ by one thing."""
    grounded = analysis.final("grounded", part)
    lines = []
    for arm, base, why in PAIRS:
        if {arm, base} <= {*arms} and (found := analysis.paired(runs, arm, grounded, base=base)) is not None:
            lines.append(f"- **{arm} against {base}**, {why}: {_told(found, base)}.")
    return "\n".join(lines)


def _told(found: Difference, base: str) -> str:
    return f"{verdict(found, base=base)}, {shown(found)} points, {len(found.by_seed)} seed(s)"


def verdict(found: Difference, *, base: str = "dense") -> str:
    """What the interval says of accuracy on grounded words."""
    if len(found.by_seed) < FEW:
        return f"too few seeds to compare with {base}"
    few = "" if len(found.by_seed) >= ENOUGH else "so far "
    if found.low > 0:
        return f"{few}better than {base}"
    if found.high < 0:
        return f"{few}worse than {base}" + (", by no more than a point" if found.low > -MARGIN else "")
    if found.low > -MARGIN:
        return f"{few}not worse than {base} by more than a point"
    return f"{few}not told apart from {base}"
