"""What the gate decides in one forward, decided on the host.

The batch is read once, before the forward. From then on the host knows how many positions there are of each kind and
only tells the device, so that no part of the forward waits for the device because it is gated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model_adapters import Layout
from regate.config import Config
from regate.labels import IGNORED, count_of, predicted, predictors
from regate.scoring.selection import active_positions
from regate.scoring.visual import thinned
from regate_patch import Active, to_device


@dataclass(frozen=True)
class Decision:
    """What the gate decided in one forward; tensors are [B, S], on the CPU.

    Attributes:
        full: every label kept, by the schedule? A step with full turns of some samples is none.
        labels: int64, as the batch brought them, but for those that are no sample's.
        on_padding: int64, those that belong to padding and enter the loss all the same, -100 elsewhere; None where
            there are none, and on sparse steps, which leave them out.
        valid: bool, False on padding.
        kept: bool, labels that enter the loss.
        whole: bool, positions of samples that keep every label and every visual token.
        active: bool, positions that the decoder computes; on the decoder's device once `thin` has chosen them.
        spare: bool, visual ones that may still be left out (`Config.visual_keep`), as soon as there are embeddings to
            choose by; None where there are none, or no longer.
        computed: per row, how many positions the decoder computes in the end.
        read: per row, how many of them predict a kept label.
        labels_seen, labels_kept, positions_seen: of the batch.
    """

    full: bool
    labels: Tensor
    valid: Tensor
    kept: Tensor
    whole: Tensor
    active: Tensor
    spare: Tensor | None
    computed: list[int]
    read: list[int]
    labels_seen: int
    labels_kept: int
    positions_seen: int
    on_padding: Tensor | None = None

    @classmethod
    def of(
        cls,
        layout: Layout,
        kept: Tensor,
        config: Config,
        *,
        full: bool,
        beyond: bool | Tensor,
        whole: Tensor | None = None,
        on_padding: Tensor | None = None,
    ) -> Decision:
        """From a batch's layout and the labels kept, both on the CPU; `beyond` as in `active_positions`.

        `whole` as above; if not given, all positions of a full step, and none of another. `on_padding` is of the batch.
        """
        spare = None
        whole = torch.full_like(layout.valid, full) if whole is None else whole
        active = active_positions(
            layout.labels, kept, layout.valid, alignment=config.alignment, beyond=beyond, visual=layout.visual
        )
        computed = active.sum(1)
        if config.visual_keep < 1 and not full:
            spare = layout.visual & active & ~predictors(kept) & ~whole
            n = spare.sum(1)
            computed -= n - count_of(n, config.visual_keep)
            spare = spare if bool(spare.any()) else None
        seen, labels_kept = int(predicted(layout.labels).sum()), int(kept.sum())
        return cls(
            full, layout.labels, layout.valid, kept, whole, active, spare, computed.tolist(), kept.sum(1).tolist(),
            seen, labels_kept, int(layout.valid.sum()), on_padding if full else None,
        )  # fmt: skip

    @property
    def sums(self) -> dict[str, int]:
        """For the counters."""
        return {
            "labels_seen": self.labels_seen,
            "labels_kept": self.labels_kept,
            "positions_seen": self.positions_seen,
            "positions_computed": sum(self.computed),
        }

    @property
    def share(self) -> float:
        """Of the labels that are kept."""
        return self.labels_kept / self.labels_seen

    @property
    def labels_left(self) -> Tensor:
        """The labels, -100 where they are not kept."""
        left = torch.where(self.kept, self.labels, IGNORED)
        return left if self.on_padding is None else torch.where(self.on_padding != IGNORED, self.on_padding, left)

    def thin(self, embeddings: Tensor, keep: float) -> Decision:
        """With the share `keep` of spare tokens, chosen by `embeddings` [B, S, D]."""
        if self.spare is None:
            return self
        stay = thinned(embeddings, self.spare, keep)
        surely = to_device(self.active & ~self.spare, embeddings.device)
        return replace(self, active=surely | stay, spare=None)

    def positions(self, device: torch.device, *, read: bool, owner: Tensor, visible: bool = False) -> Active:
        """For the engine, on `device`; with `read`, only predictors of kept labels are read in the output.

        Args:
            owner: int64 [B, S] on the CPU, the sample of each position.
            visible: are positions that are left out seen, but for padding?
        """
        chosen = Active.from_mask(self.active, counts=self.computed)
        if self.active.device == owner.device:  # else nobody knows yet which are left
            of_samples = torch.zeros(int(owner.max()) + 1, dtype=torch.int64, device=owner.device)
            of_samples.scatter_add_(0, owner.flatten(), self.active.flatten().long())
            chosen = replace(chosen, samples=tuple(of_samples.tolist()))
        if read:
            chosen = chosen.reading(to_device(predictors(self.kept), self.active.device), counts=self.read)
        if visible:
            chosen = replace(chosen, visible=self.valid)
        return chosen.to(device)
