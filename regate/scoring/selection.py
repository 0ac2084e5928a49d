"""Which labels are kept, and which positions the decoder computes for them (paper, section 3.3).

Shapes: B rows, S decoder positions; position j predicts the label at j + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate.config import Alignment
from regate.labels import IGNORED, count_of, predictors, up_to_last


def keep_share(
    scores: Tensor,
    candidates: Tensor,
    keep: float,
    *,
    pooled: bool,
    explore: float = 0.0,
    draws: Tensor | None = None,
) -> Tensor:
    """`keep_highest`; or, `pooled`, of the candidates of all rows together, the best of each row among them.

    The best of each, because a loss may be a mean of rows' means, and a row without labels has none.
    """
    if not pooled:
        return keep_highest(scores, candidates, keep, explore=explore, draws=draws)
    best = best_of_each(scores, candidates)
    kept = keep_highest(
        scores.reshape(1, -1),
        candidates.reshape(1, -1),
        keep,
        surely=best.view(1, -1),
        explore=explore,
        draws=None if draws is None else draws.reshape(1, -1),
    )
    return kept.view_as(candidates)


def keep_highest(
    scores: Tensor,
    candidates: Tensor,
    keep: float,
    *,
    surely: Tensor | None = None,
    explore: float = 0.0,
    draws: Tensor | None = None,
) -> Tensor:
    """The `ceil(keep * n)` candidates of each row with the highest scores, or most of them and some at random.

    Args:
        scores: [B, S] float; read at candidates only.
        candidates: [B, S] bool.
        keep: share, 0 < keep <= 1.
        surely: [B, S] bool, candidates that are among those kept, if need be more of them than that.
        explore: share of those kept, rounded down, that have the highest `draws` among the others instead.
        draws: [B, S] random, finite; needed where `explore` is not 0.

    Returns:
        [B, S] bool. Equal scores are kept from the left.

    Example:
        >>> keep_highest(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, True, True]]), 0.5).tolist()
        [[False, True, True]]
    """
    n = candidates.sum(1, keepdim=True)
    k = torch.maximum(count_of(n, keep), n.clamp(max=1))  # a share may be too small for what rounding takes off
    surely = torch.zeros_like(candidates) if surely is None else surely
    k = torch.maximum(k, surely.sum(1, keepdim=True))
    scores = scores.float().masked_fill(surely, float("inf"))
    if draws is None or not explore:
        return _highest(scores, candidates, k)
    best = _highest(scores, candidates, k - torch.floor(k.double() * explore + 1e-6))
    return _highest(draws.masked_fill(best | surely, float("inf")), candidates, k)


def best_of_each(scores: Tensor, candidates: Tensor) -> Tensor:
    """The candidate of each row with the highest score, if it has any, bool [B, S]; arguments as in `keep_highest`."""
    return _highest(scores, candidates, torch.ones_like(scores[:, :1], dtype=torch.int64))


def _highest(scores: Tensor, candidates: Tensor, k: Tensor) -> Tensor:
    """The `k` [B, 1] candidates of each row with the highest scores."""
    order = scores.float().masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    )
    return (rank < k) & candidates


def active_positions(
    labels: Tensor,
    kept: Tensor,
    valid: Tensor,
    *,
    alignment: Alignment,
    beyond: bool | Tensor = False,
    visual: Tensor | None = None,
) -> Tensor:
    """The positions that a decoder must compute for the kept labels.

    Args:
        labels: [B, S] int64, -100 where unsupervised.
        kept: [B, S] bool, the labels kept.
        valid: [B, S] bool, False on padding.
        alignment: see `Config.alignment`.
        beyond: also what follows the last predictor of a kept label: somebody reads it. Or where so, bool [B, S].
        visual: [B, S] bool, no answer tokens, though labels may stand on them.

    Returns:
        [B, S] bool. True where a position holds no answer token (image, instruction, template), where the label
        it predicts is kept, or where an answer token ends a turn; never on padding, and not after the row's
        last predictor of a kept label, where causal attention makes a position useless.
    """
    answer = labels != IGNORED
    predicts, predicts_kept = predictors(answer), predictors(kept)
    active = ~answer | predicts_kept | (answer & ~predicts)
    if alignment == "both":
        active |= kept
    if visual is not None:
        active |= visual
    return active & valid & (up_to_last(predicts_kept) | beyond)
