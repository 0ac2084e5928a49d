"""What a patched decoder did, and what that costs in FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from regate_patch.context import Active
from regate_patch.passes.rewrite import Rewrite


@dataclass
class Statistics:
    """What a patched decoder did so far.

    Attributes:
        graphs: one `Rewrite` per captured graph that holds attention, and another where sequences came for which its
            windows are too narrow to be left out (`Rewrite.longest`), or where it is known only now and then how many
            positions samples have. Of the latest capture, where hooks that came made another.
        other_graphs: captured graphs without attention, which run as they are.
        recompiles: graphs of both kinds captured after the first call had ended.
        calls: calls under `active(...)`.
        put_elsewhere: values per token that the last such call, in one graph, gave out otherwise than by returning
            them: a wrapped layer or a hook keeps them. They are right where everything is read.
        last: the rewrites that the last such call ran, in order (one graph may run once per layer).
        failed: why the decoder runs dense since (`on_unsupported="warn"`), or None.
        skipped: did it run dense in the last such call alone, for Dynamo was switched off around it?
        causes: why it ran dense in any call so far.
    """

    graphs: list[Rewrite] = field(default_factory=list)
    other_graphs: int = 0
    recompiles: int = 0
    calls: int = 0
    put_elsewhere: int = 0
    last: tuple[Rewrite, ...] = ()
    failed: str | None = None
    skipped: bool = False
    causes: list[str] = field(default_factory=list)

    @property
    def ran_dense(self) -> bool:
        """Did the last such call run every position, as `on_unsupported="warn"` allows?"""
        return self.skipped or self.failed is not None

    def forget(self) -> None:
        """The decoder is captured anew: its graphs so far are no longer what runs."""
        self.graphs.clear()
        self.other_graphs = 0

    @property
    def attention(self) -> int:
        """Attention blocks that one call runs."""
        return sum(rewritten.attention for rewritten in self.last)

    @property
    def mlp(self) -> int:
        """MLP blocks that one call runs."""
        return sum(rewritten.mlp for rewritten in self.last)

    @property
    def apart(self) -> bool:
        """Did that call keep samples of one row apart?"""
        return bool(self.last) and all(rewritten.apart for rewritten in self.last)

    def flops(self, positions: int, read: int | None = None) -> int:
        """Forward FLOPs of all blocks for one row that computes this many positions, of which so many are read."""
        return self._flops([positions], positions if read is None else read)

    def flops_of(self, active: Active) -> int:
        """The same for a call on these positions, the filling of short rows included where it is computed."""
        rows = len(active.index)
        read = active if active.read is None else active.read
        laid = all(rewritten.end_to_end for rewritten in self.last)
        computed, of_read = [active.longest] * rows, [read.longest] * rows
        if laid and active.counts is not None and read.counts is not None:
            computed, of_read = list(active.counts), list(read.counts)
            if self.apart and active.samples:
                computed = list(active.samples)
        if active.visible is not None:
            seen = active.visible.shape[1]
            return sum(self._flops_seeing(seen, n, m) for n, m in zip(computed, of_read, strict=True))
        return self._flops(computed, sum(of_read))

    def _flops(self, lengths: Sequence[int], read: int) -> int:
        positions, squares = sum(lengths), sum(n * n for n in lengths)
        return sum(
            r.flops_linear * positions + r.flops_quadratic * squares - r.flops_tail * (positions - read)
            for r in self.last
        )

    def _flops_seeing(self, seen: int, computed: int, read: int) -> int:
        """Of one row."""
        return sum(
            each * computed + pair * computed * seen + still * seen - r.flops_tail * (computed - read)
            for r in self.last
            for each, pair, still in [r.flops_visible]
        )
