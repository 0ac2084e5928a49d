"""How hard each label still is for the student: a moving average of its own loss (paper, section 3.2).

Before a sample was ever seen, its labels are judged by the vocabulary: a moving average of the student's loss on
each token id. In one-epoch fine-tuning no sample is seen twice, and this prior decides everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNSEEN = -1.0  # in place of a loss, which is never negative


def update(m: Tensor, loss: Tensor, observed: Tensor, *, decay: float) -> Tensor:
    """`decay*m + (1-decay)*loss` where `observed`; the first observation replaces `UNSEEN`.

    Args:
        m, loss: float, of one shape.
        observed: bool of that shape; non-finite losses are never taken over.
    """
    first = m == UNSEEN
    fresh = torch.where(first, loss, decay * m + (1 - decay) * loss)
    return torch.where(observed & torch.isfinite(loss), fresh, m)


class VocabularyPrior:
    """Moving average of the student's loss per token id, on the CPU; it grows with the ids it is shown."""

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.mean = torch.zeros(0, dtype=torch.float32, device="cpu")

    def _grow(self, ids: Tensor) -> None:
        more = int(ids.max()) + 1 - len(self.mean) if ids.numel() else 0
        if more > 0:
            self.mean = torch.cat([self.mean, self.mean.new_full((more,), UNSEEN)])

    def observe(self, ids: Tensor, losses: Tensor) -> None:
        """Take over the losses of labels `ids` (both [N]); non-finite ones are left out."""
        self._grow(ids)
        finite = torch.isfinite(losses)
        ids, losses = ids[finite], losses[finite].float()
        count = torch.zeros_like(self.mean).index_add_(0, ids, torch.ones_like(losses))
        total = torch.zeros_like(self.mean).index_add_(0, ids, losses)
        self.mean = update(self.mean, total / count.clamp(min=1), count > 0, decay=self.decay)

    def expect(self, ids: Tensor) -> Tensor:
        """Expected loss of labels `ids` (any shape); unseen ids get the mean over those seen, or 0."""
        self._grow(ids)
        seen = self.mean != UNSEEN
        overall = torch.where(seen, self.mean, 0.0).sum() / seen.sum().clamp(min=1)
        return torch.where(seen, self.mean, overall)[ids]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"].cpu().clone()
