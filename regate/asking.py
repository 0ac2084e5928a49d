"""What a model is asked, in its first forward and where its loss has changed: what may full steps leave out?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import regate_patch
from model_adapters import Layout
from model_adapters.attention import stand_in
from model_adapters.base import labels_alone
from model_adapters.flash import called_by
from regate.decoding import Decoding
from regate.labels import IGNORED, predictors, up_to_last
from regate.parts import Parts
from regate.proof.prove import Proven, few_of, prove
from regate.proof.reads import Read, least
from regate.proof.trial import Subject
from regate.ranks import highest
from regate.scoring.decision import Decision
from regate.training import supervision
from regate.training.batches import ignored_as_here
from regate.undisturbed import without_dropout
from regate_patch import is_sharded, to_device

OTHER = (
    "on the first batch the engine's numbers without padding are not the model's, by more than its dtype's digits "
    "explain. Full steps run the model as it is, but sparse steps may be off as much: train it with "
    "regate.Config.exact() or without a gate, and report the model"
)


def ask_for_readers(
    parts: Parts,
    call: Mapping[str, Any],
    layout: Layout,
    beside: Mapping[str, Any],
    *,
    owner: Tensor,
    balanced: bool,
) -> Proven:
    """What full steps may leave out of the model's output (see `regate/proof`).

    Args:
        parts: the gate's.
        call: the arguments of the model's call.
        layout: of the batch, [B, S].
        beside: what `supervision.beside` found.
        owner: int64 [B, S] on the CPU, the sample of each position.
        balanced: does a router's loss read every position that is no padding?

    Raises:
        UnsupportedGraphError: its kernels of attention compute something else than the model does.
    """
    if parts.config.logits == "kept":
        parts.handle.captures()  # raises before what the proof runs trips over it
    labels, valid, few = layout.labels, layout.valid, few_of(layout.labels)
    some = replace(layout, labels=torch.where(few, labels, IGNORED))
    sharded = is_sharded(parts.target)
    own_head = bool(call.get("fused_lm_head"))  # which leaves out what has no label by itself
    plain = parts.adapter.with_labels is labels_alone and not own_head
    shortens = plain and not supervision.has_tensors(beside)

    @contextlib.contextmanager
    def elide(read: Read, tail: bool) -> Iterator[None]:
        decision = Decision.of(some, few, parts.config, full=True, beyond=read >= Read.VALID)
        with Decoding(parts, call, some, decision, owner, balanced, tail).entering():
            yield

    few_labels = to_device(some.labels, call["labels"].device)
    with without_dropout(parts.decoder) as had_dropout, _aside(parts, had_dropout), ignored_as_here():
        proven = prove(
            Subject(
                model=parts.target,
                decoder=parts.decoder,
                call={
                    **call,
                    **parts.adapter.with_labels(parts.model, call, few_labels),
                    **supervision.masked(beside, labels, few),
                    **parts.without_cache(call),
                },
                labels=labels,
                few=few,
                live=valid & up_to_last(predictors(few)),
                valid=valid,
                elide=elide,
                beside=_around(parts),
                lazy=None if sharded else parts.lazy_head(),
                short=shortens and parts.config.logits == "kept",
                at_least=Read.ALL if parts.config.logits == "all" else least(balanced=balanced),
                backward=not sharded,
                in_step=parts.readers.in_step,
                highest=highest if parts.readers.in_step else int,
            )
        )
    if proven.other:
        _refuse_kernels(parts)
    for note in (*proven.notes, *([OTHER] if proven.other else [])):
        parts.note(note)
    return proven


def _around(parts: Parts) -> list[nn.Parameter]:
    """What is trained beside the language model."""
    adapter = parts.adapter
    known = (parts.decoder, adapter.embeddings(parts.model), parts.head)
    of_text = {id(p) for part in known for p in part.parameters()}
    return [p for p in parts.target.parameters() if p.requires_grad and id(p) not in of_text]


@contextlib.contextmanager
def _aside(parts: Parts, aside: bool) -> Iterator[None]:
    """Inside, the engine's graphs are for the moment: what is captured without dropout is not what trains."""
    with parts.handle.aside() if aside else contextlib.nullcontext():
        yield


def _refuse_kernels(parts: Parts) -> None:
    """The engine's numbers are not the model's: is it attention that knows less than the model's own?"""
    name = type(parts.decoder).__name__
    if (usual := stand_in(parts.decoder)) is not None:
        raise regate_patch.UnsupportedGraphError(
            f"the attention kernels of {name} compute something else than its '{usual}' attention: they know causal "
            "order, windows and padding, and leave out what else its masks say, such as image tokens that see one "
            f"another. Train it with attn_implementation='{usual}'"
        )
    if calls := called_by(parts.decoder):
        raise regate_patch.UnsupportedGraphError(
            f"{name} calls {', '.join(sorted({function for _, function in calls}))} by itself, and computes something "
            "else where it is given no padding mask but no padding either: its code takes more from the mask than what "
            "is padding. Build it with SDPA or eager attention"
        )
