"""What is known of who reads the decoder's output of one model, and what forwards may therefore leave out.

Three sources: what a first batch proved (`prove.py`); who hangs on the model now (`reads.py`), asked at each forward;
and what a forward that was run showed, after which it is run again with more computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from model_adapters import ModelAdapter
from model_adapters.conventional import way_to
from regate.errors import HiddenStatesError
from regate.output.head import hidden_states
from regate.output.outputs import hands_out, loss_of
from regate.proof import reads
from regate.proof.prove import NOTHING, Proven, few_of, tells_rows
from regate.proof.reads import Read
from regate.ranks import any_rank, ranks
from regate_patch import is_sharded

_WAYS = 8  # in which a model may compute its loss, each of them proven
_FIRST = 3  # forwards after which it is looked at what modules keep


@dataclass(frozen=True)
class Saving:
    """What one forward leaves out.

    Attributes:
        read: what it computes where it keeps every label.
        short: its head runs at kept labels alone.
        lazy: their logits exist a chunk at a time.
    """

    read: Read
    short: bool = False
    lazy: bool = False

    @property
    def any(self) -> bool:
        """Is there something that a reader could miss?"""
        return self.short or self.read < Read.ALL


@dataclass
class Readers:
    """See the module's description.

    Attributes:
        target, decoder: the module whose call receives labels, and the one whose output is read.
        adapter: the model's.
        note: tells the user something, once.
        proven: what full steps may leave out; None before the first forward.
    """

    target: nn.Module
    decoder: nn.Module
    adapter: ModelAdapter
    note: Callable[[str], None]
    proven: Proven | None = None
    _between: list[nn.Module] = field(init=False)  # the modules through which `target` calls `decoder`
    _ways: set[Any] = field(default_factory=set)  # in which losses came from the decoder's output
    _unproven: bool = False  # came the last one in another?
    _handed_out: str | None = None  # does the model return its decoder's output? Then how to say so
    _put_elsewhere: str | None = None  # who keeps values of the decoder that it does not return
    _strays: list[Tensor] = field(default_factory=list)  # positions that backward passes read for nothing, int64 []
    _in_step: bool | None = None
    _looked: int = 0

    def __post_init__(self) -> None:
        self._between = way_to(self.target, self.decoder)[1:-1]

    @property
    def in_step(self) -> bool:
        """Must ranks run the model's forward equally often? It is split before its first step, if ever."""
        if self.proven is None or self._in_step is None:
            self._in_step = is_sharded(self.target) or (self.adapter.in_step and ranks() > 1)
        return self._in_step

    # -- what is proven -------------------------------------------------------------------------------

    def due(self, labels: Tensor | None, call: Mapping[str, Any]) -> bool:
        """Is a proof due in this forward, with labels [B, S] or without any?

        In step it runs on all ranks at once: when all have labels. Where the first batch could not tell all, a later
        one that can is looked at, too.
        """
        if self.proven is None:
            return labels is not None if not self.in_step else not any_rank(labels is None)
        if labels is None or self.in_step or not self.proven.short:
            return False
        few = few_of(labels)
        return (not self.proven.rows and tells_rows(few, call)) or (
            not self.proven.empty and not bool(few.any(1).all())
        )

    def learn(self, found: Proven) -> None:
        """A batch proved that."""
        self.proven = found if self.proven is None else self.proven.weakened(found)

    # -- who hangs on the model -----------------------------------------------------------------------

    def hanging(self, call: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Who asks for the decoder's values in this call, and who reads inside it; None where nobody does."""
        return reads.asked_for(call, self.target), reads.inner_reader(self.decoder)

    def saving(self, kept: Tensor, *, asked: str | None, inside: str | None, head: nn.Module, least: Read) -> Saving:
        """What a forward with these labels kept, bool [B, S], may leave out, but for what stands below `least`."""
        proven = self.proven or NOTHING
        everything = (
            asked or self._handed_out or reads.logits_reader(head) or reads.output_reader(self._between, self.decoder)
        )
        if (why := everything or inside or self._put_elsewhere) is None:
            read = max(proven.read, least)
        else:
            read = Read.ALL
            self.note(f"{reads.GIVEN_UP[read]}: {why}")
        counts = kept.sum(1)
        known = (proven.empty or bool(counts.all())) and (proven.rows or len(counts.unique()) == 1)
        short = everything is None and proven.short and known
        return Saving(read, short, lazy=short and proven.lazy)

    # -- what a forward showed ------------------------------------------------------------------------

    def outgrown(self, saving: Saving, output: Any, decoded: Any, *, made: Tensor | None, elsewhere: int) -> bool:
        """Is more read of what the decoder computes than was proven? Then this forward must run anew.

        A loss that comes about in a way of its own, as an auxiliary one does that is added later, was not proven.

        Args:
            saving: what it left out.
            output: of the model.
            decoded: of the decoder; None where it did not run, or keeps all that it is to.
            made: hidden states as the decoder made them, before anything was taken off.
            elsewhere: values that left the decoder otherwise.
        """
        if elsewhere and saving.read < Read.ALL:
            self._put_elsewhere = reads.PUT_ELSEWHERE.format(n=elsewhere)
            return True
        if decoded is None or not saving.any:
            return False
        hidden = hidden_states(decoded)
        if hands_out(output, hidden):
            self._handed_out = reads.HANDED_OUT
        elif saving.read < Read.ALL and self._looked < _FIRST:
            self._looked += 1
            parts = (self.target, *self._between, self.decoder)
            self._handed_out = reads.kept_aside(parts, [hidden, *([] if made is None else [made])])
        if self._handed_out:
            return True
        loss = loss_of(output)
        if loss is None or self.in_step:
            return False
        way = (saving, reads.operations(loss, (hidden, decoded)))
        self._unproven = bool(self._ways) and way not in self._ways
        self._ways.add(way)
        return self._unproven

    def due_again(self) -> bool:
        """A forward was outgrown: is a proof due in the one that takes its place?"""
        due, self._unproven = self._unproven, False
        if len(self._ways) <= _WAYS:
            return due
        self.note(f"{reads.GIVEN_UP[Read.ALL]}: the model computes its loss in ever new ways")
        self.proven = NOTHING
        return False

    def count_stray(self, read: Tensor) -> None:
        """In a backward pass; a GPU is not waited for before the next forward."""
        self._strays.append(read)
        if not read.is_cuda:
            self.check_strays()

    def check_strays(self) -> None:
        """Did something besides the model's loss read hidden states of a forward before?

        Raises:
            HiddenStatesError: it did.
        """
        strays, self._strays = self._strays, []
        if read := sum(map(int, strays)):
            raise HiddenStatesError(
                f"something besides the loss of {type(self.target).__name__}, or a part of it that had no gradient in "
                f"the first forward, reads hidden states of its decoder, at {read} position(s) that no label is "
                "predicted from: they were not all computed, and are not where "
                "they would be. Call the model with output_hidden_states=True and take outputs.hidden_states, or train "
                "with regate.Config(logits='all')"
            )
