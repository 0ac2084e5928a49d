"""What gating did, for a person and as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from regate.training.counters import Counters, Number


class Report(Mapping[str, Number]):
    """A mapping of plain numbers; `str(report)` reads as text.

    Args:
        counters: of the run so far.
        found: other numbers, by name.
        notes: what the user should know.
        warmup: how many steps it has, if there was no other step so far.
    """

    def __init__(
        self, counters: Counters, found: Mapping[str, Number], notes: list[str], *, warmup: int | None = None
    ) -> None:
        self._numbers: dict[str, Number] = {**found, **asdict(counters)}
        self.notes, self._warmup = notes, warmup
        seen = max(counters.flops_computed, 1.0)
        self._numbers["speedup_possible"] = counters.flops_dense / seen if counters.flops_dense else 1.0

    def __getitem__(self, name: str) -> Number:
        return self._numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __str__(self) -> str:
        n = self._numbers
        lines = [
            f"decoder    {n['attention_blocks']} attention and {n['mlp_blocks']} MLP blocks in {n['graphs']} graph(s), "
            f"{n['recompiles']} of them recompiled",
            f"steps      {n['steps_full']} full, {n['steps_sparse']} sparse{self._aside()}",
            f"labels     {n['labels_kept']:,} of {n['labels_seen']:,} kept{_share(n['labels_kept'], n['labels_seen'])}",
            f"positions  {n['positions_computed']:,} of {n['positions_seen']:,} computed"
            f"{_share(n['positions_computed'], n['positions_seen'])}",
            f"teacher    {n['teacher_samples']:,} samples in {n['teacher_seconds']:.1f} s",
            f"gating     {n['gate_seconds']:.1f} s on the host",
            f"FLOPs      {n['speedup_possible']:.2f}x fewer in decoder and head than the same steps dense",
        ]
        if n["samples_whole"]:
            of_sparse = n["samples_whole"] + n["samples_sparse"]
            lines.append(
                f"samples    {n['samples_whole']:,} of {of_sparse:,} in sparse steps were full samples, with every "
                f"label kept{_share(n['samples_whole'], of_sparse)}"
            )
        if n["steps_guarded"]:
            lines.append(f"guard      {n['steps_guarded']:,} of the full steps, since what is left out had got worse")
        if n["forwards_joined"]:
            lines.append(
                f"ranks      {n['forwards_joined']:,} forwards ran encoders for nothing, because other ranks had images"
            )
        if n["samples_found_again"]:
            lines.append(f"memory     {n['samples_found_again']:.0%} of the latest samples had been seen before")
        if n["speedup_measured"]:
            lines.append(
                f"time       {n['seconds_per_full_step']:.3f} s per full step, {n['seconds_per_sparse_step']:.3f} s "
                f"per sparse one: {n['speedup_measured']:.2f}x measured"
            )
        return "\n".join(lines + [f"note       {note}" for note in self.notes])

    def _aside(self) -> str:
        """What is unusual about the steps, behind their numbers."""
        if missed := self["steps_missed"]:
            return f"; {missed} should have been sparse, and were not"
        if self["steps_full"] and self._warmup is not None:
            return f"; all of them were warm-up so far (warmup={self._warmup})"
        return ""


def _share(part: Number, whole: Number) -> str:
    return f" ({part / whole:.0%})" if whole else ""
