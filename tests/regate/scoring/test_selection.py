"""Selection and alignment, against a row-by-row reading of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regate.config import Alignment
from regate.labels import IGNORED, predicted
from regate.scoring.selection import active_positions, best_of_each, keep_highest, keep_share


def _random(seed: int) -> tuple[Tensor, Tensor]:
    """Labels in one or two spans, and validity with padding on either side."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.full((6, 24), IGNORED)
    valid = torch.ones(6, 24, dtype=torch.bool)
    for row in range(6):
        start = int(torch.randint(0, 8, (), generator=g))
        labels[row, start : start + 5] = 7
        if row % 2:
            labels[row, 15:20] = 8
        pad = int(torch.randint(0, 4, (), generator=g))
        valid[row, slice(24 - pad, 24) if row % 3 else slice(0, pad)] = False
        labels[row][~valid[row]] = IGNORED
    return labels, valid


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_keeps_the_highest(keep: float) -> None:
    labels, _ = _random(0)
    candidates = predicted(labels)
    scores = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    kept = keep_highest(scores, candidates, keep)
    for row in range(len(labels)):
        at = candidates[row].nonzero()[:, 0].tolist()
        k = math.ceil(keep * len(at) - 1e-9)
        best = sorted(at, key=lambda i: -float(scores[row, i]))[:k]
        assert sorted(best) == kept[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_share_may_be_as_small_as_it_likes(pooled: bool) -> None:
    """One label is kept; integers are scores, too."""
    candidates = predicted(_random(0)[0])
    kept = keep_share(candidates.cumsum(1), candidates, 1e-9, pooled=pooled)
    assert torch.equal(kept.sum(1), candidates.sum(1).clamp(max=1))
    assert not bool((kept & ~candidates).any())


@pytest.mark.parametrize("explore", [0.0, 0.3, 0.5, 1.0])
def test_explores_with_a_share_of_the_budget(explore: float) -> None:
    candidates = predicted(_random(0)[0])
    generator = torch.Generator().manual_seed(1)
    scores, draws = (torch.rand(candidates.shape, generator=generator) for _ in range(2))
    kept = keep_highest(scores, candidates, 0.7, explore=explore, draws=draws)
    for row in range(len(candidates)):
        at = candidates[row].nonzero()[:, 0].tolist()
        k = math.ceil(0.7 * len(at) - 1e-9)
        best = sorted(at, key=lambda i: -float(scores[row, i]))[: k - math.floor(explore * k)]
        drawn = sorted(set(at) - set(best), key=lambda i: -float(draws[row, i]))[: k - len(best)]
        assert sorted(best + drawn) == kept[row].nonzero()[:, 0].tolist()


def test_nothing_to_keep_in_a_row_without_labels() -> None:
    candidates = torch.tensor([[False, False, False], [False, True, False]])
    assert keep_highest(torch.rand(2, 3), candidates, 0.5).tolist() == candidates.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_active_positions_follow_the_definition(seed: int) -> None:
    labels, valid = _random(seed)
    kept = keep_highest(torch.rand(labels.shape), predicted(labels), 0.5)
    active = active_positions(labels, kept, valid, alignment="predictor")
    for b, row in enumerate(labels.tolist()):
        predictors = [j for j in range(23) if kept[b, j + 1]]
        for j in range(24):
            is_answer = row[j] != IGNORED
            next_label = j < 23 and row[j + 1] != IGNORED
            wanted = (not is_answer) or (kept[b, j + 1] if next_label else True)
            wanted = bool(wanted) and bool(valid[b, j]) and bool(predictors) and j <= predictors[-1]
            assert wanted == bool(active[b, j]), (b, j)


def test_both_adds_the_kept_tokens() -> None:
    labels = torch.tensor([[IGNORED, 5, 6, 7, 8, IGNORED, 9]])
    kept = torch.tensor([[False, False, True, False, False, False, True]])
    valid = torch.ones_like(kept)
    predictor = active_positions(labels, kept, valid, alignment="predictor")
    both = active_positions(labels, kept, valid, alignment="both")
    assert predictor.tolist() == [[True, True, False, False, True, True, False]]
    assert both.tolist() == [[True, True, True, False, True, True, False]]


@pytest.mark.parametrize("alignment", ["predictor", "both"])
def test_visual_tokens_are_computed_though_labels_stand_on_them(alignment: Alignment) -> None:
    """As where labels are a copy of the ids."""
    labels = torch.tensor([[3, 9, 9, 9, 5, 6, 7]])
    visual = labels == 9
    kept = torch.tensor([[False, False, False, False, False, False, True]])
    active = active_positions(labels, kept, torch.ones_like(kept), alignment=alignment, visual=visual)
    assert active.tolist() == [[False, True, True, True, False, True, False]]


@pytest.mark.parametrize("explore", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6])
def test_what_is_surely_kept_is_of_the_share(keep: float, explore: float) -> None:
    scores, draws = torch.rand(1, 20), torch.rand(1, 20)
    candidates = torch.ones(1, 20, dtype=torch.bool)
    surely = torch.zeros_like(candidates)
    surely[0, [3, 7, 11]] = True
    kept = keep_highest(scores, candidates, keep, surely=surely, explore=explore, draws=draws)
    assert kept[surely].all()
    assert kept.sum() == max(3, round(keep * 20))
    if not explore:
        least = scores[kept & ~surely].min() if (kept & ~surely).any() else torch.inf
        assert least >= scores[~kept].max()


def test_the_best_of_each() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    candidates = torch.tensor([[True, False, True], [True, True, False], [False, False, False]])
    assert best_of_each(scores, candidates).int().tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
