"""What a patched decoder did, and what that costs in FLOPs."""

from __future__ import annotations

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

    def flops(self, positions: float, read: float | None = None, seen: float | None = None) -> float:
        """Forward FLOPs of all blocks for a row that computes so many positions, reads so many, and sees so many."""
        read = positions if read is None else read
        return sum(rewritten.flops(positions, read, seen) for rewritten in self.last)

    def flops_of(self, active: Active) -> float:
        """The same for a call on these positions, the filling of short rows included where it is computed."""
        rows = len(active.index)
        read = active if active.read is None else active.read
        laid = all(rewritten.end_to_end for rewritten in self.last)
        computed, of_read = [active.longest] * rows, [read.longest] * rows
        if laid and active.counts is not None and read.counts is not None:
            computed, of_read = list(active.counts), list(read.counts)
            if self.apart and active.samples:
                computed = list(active.samples)
        seen = None if active.visible is None else active.visible.shape[1]
        unread = sum(computed) - sum(of_read)  # at once: what is computed may be told of samples, what is read of rows
        return sum(self.flops(n, seen=seen) for n in computed) - unread * sum(r.flops_tail for r in self.last)
