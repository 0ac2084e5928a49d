"""What gating can gain on given data, before anything is trained: arithmetic alone, and an honest verdict.

A sample is V visual, P prompt and A answer tokens. A sparse step computes visual_keep*V + P positions and those of the
answer that kept labels need (`answer_positions`), a full step all of them, as dense training does. Of these, keep*A or
A are read: projected onto the vocabulary, and computed after the last attention; with `logits="all"` all are. The
teacher reads P + A tokens once per sample, forward only. The decoder's cost is read off its captured graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

import regate_patch
from model_adapters import Batch, find_adapter
from model_adapters.conventional import text_config
from model_adapters.signatures import signature
from regate.config import Config
from regate.errors import ConfigError, UnknownArchitectureError, served
from regate.labels import IGNORED, count_of
from regate.output.logits import CHUNK
from regate.training.batches import on_host

_WORTH, _LITTLE = 1.15, 1.05


class Sample(NamedTuple):
    """Token counts of one sample, as the decoder sees it."""

    visual: int
    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.visual + self.prompt + self.answer


@dataclass(frozen=True)
class Costs:
    """Forward FLOPs of a language model: of a row, by what was found in its decoder, and `head` for each position that
    is projected onto the vocabulary, computed or not."""

    found: regate_patch.Statistics
    head: float
    vocabulary: int

    def forward(self, positions: float, projected: float, seen: float | None = None) -> float:
        """Of a row that computes so many positions and sees so many, where it sees more."""
        return self.found.flops(positions, min(projected, positions), seen) + self.head * projected


@dataclass(frozen=True)
class Estimate:
    """Ratios to dense training of the language model with causal attention; encoder and optimizer are left out.

    Attributes:
        tokens: per sample, on average.
        answers_share: answer tokens over all tokens.
        full, sparse, schedule: how many times cheaper a full and a sparse step are, and the schedule's average; full is
            what exact mode gains (`Config.exact`).
        teacher: cost of all reference losses, over that of one dense epoch.
        run: how many times cheaper the whole run is, teacher included.
        break_even_epochs: after how many epochs the teacher's cost is regained; infinite if never.
        dense_flops: of one dense epoch, forward and backward.
        hours_dense, hours: of the whole run, dense and gated, at the throughput given; None without.
        sparse_activations: positions that a sparse step, or a sparse row beside full ones, keeps for the backward pass,
            over those of a dense one.
        peak_activations: the same of the largest step after warm-up, whose steps are full.
        logits_bytes_dense, logits_bytes_full: float32 logits of the longest sample that exist at once, in a dense
            and in a full step.
        steps: optimizer steps of the run.
        first_sparse: the first step that leaves something out, where all that the run has are full; else None.
    """

    tokens: float
    answers_share: float
    full: float
    sparse: float
    schedule: float
    teacher: float
    run: float
    break_even_epochs: float
    dense_flops: float
    hours_dense: float | None
    hours: float | None
    sparse_activations: float
    peak_activations: float
    logits_bytes_dense: int
    logits_bytes_full: int
    steps: int
    first_sparse: int | None

    @property
    def verdict(self) -> str:
        told = f"{self.run:.2f}x on the language model over the whole run"
        if self.first_sparse is not None:
            why = f"the first sparse one would be step {self.first_sparse} (--warmup)"
            if self.first_sparse < self.steps:
                why = "the last ones, --final-full-steps, begin before the first sparse one"
            told += f". All {self.steps} steps are full, and nothing is left out: {why}"
        if self.run >= _WORTH:
            return f"worth it: {told}"
        if self.run >= _LITTLE:
            return f"a little: {told}"
        return f"not worth it here, for speed: {told}{self._why_not()}"

    def _why_not(self) -> str:
        """What the loss of time comes from, and what would cost less; nothing where warm-up has been named."""
        if self.schedule >= _LITTLE:  # which is what the run is where no teacher is paid
            return (
                f". The teacher costs {self.teacher:.0%} of a dense epoch, once, and is regained after {self._pays()}. "
                f"A smaller one costs less (--teacher); without one (reference_weight=0) the run is "
                f"{self.schedule:.2f}x, and in exact mode (keep=1) {self.full:.2f}x"
            )
        if self.first_sparse is not None:
            return ""
        return f". Answers are {self.answers_share:.0%} of the tokens, and only answers can be elided"

    def _pays(self) -> str:
        return f"{self.break_even_epochs:.2f} epochs" if self.break_even_epochs < 1e6 else "never"

    def __str__(self) -> str:
        time = []
        if self.hours_dense is not None:
            time = [f"time       {self.hours_dense:,.1f} hours dense, {self.hours:,.1f} gated, of the language model"]
        return "\n".join(
            [
                f"data       {self.tokens:,.0f} tokens per sample, answers are {self.answers_share:.0%} of them",
                f"steps      full {self.full:.2f}x, sparse {self.sparse:.2f}x, schedule {self.schedule:.2f}x cheaper",
                f"FLOPs      {self.dense_flops:.3g} for one dense epoch of the language model",
                *time,
                f"teacher    {self.teacher:.1%} of a dense epoch, once; regained after: {self._pays()}",
                f"memory     {self.sparse_activations:.0%} of the positions' activations are kept where labels are "
                f"left out, {self.peak_activations:.0%} in the largest step after warm-up; "
                f"{self.logits_bytes_full / 1e6:,.0f} MB of logits per sample where dense has "
                f"{self.logits_bytes_dense / 1e6:,.0f} MB",
                f"verdict    {self.verdict}",
            ]
        )


def estimate(
    model: nn.Module | PretrainedConfig,
    samples: Iterable[Sequence[int]],
    config: Config | None = None,
    *,
    epochs: float = 1,
    steps: int | None = None,
    copies: float = 1,
    rows: int | None = None,
    teacher: nn.Module | PretrainedConfig | None = None,
    flops_per_second: float | None = None,
) -> Estimate:
    """What `config` gains on `samples` with this model.

    Args:
        model: a model, or a transformers configuration, of which no weight is made.
        samples: (visual, prompt, answer) token counts of each.
        config: of the gate.
        epochs: of the run; the teacher is paid once.
        steps: optimizer steps of the run, of which the schedule says which are full; None is one per sample.
        copies: how many samples of the data each of `samples` stands for.
        rows: of one forward on one device, for `peak_activations`; None is many. Where rows cannot be laid end to
            end, all of them are full at once (`gate.report()` says so), and the peak is that of a full step.
        teacher: another model that gives the reference losses; None is the language model itself.
        flops_per_second: that dense training sustains, all devices together, for `hours`.

    Raises:
        ConfigError: no samples, or counts that are negative or hold no answer.
        UnknownArchitectureError: no adapter serves the model.
    """
    config = config or Config()
    counted = [Sample(*map(int, sample)) for sample in samples]
    if not counted or any(min(s) < 0 or s.answer == 0 for s in counted):
        raise ConfigError("estimate needs samples of (visual, prompt, answer) token counts, each with an answer")
    model = build_on_meta(model) if isinstance(model, PretrainedConfig) else model
    visible = config.elided == "visible"
    found = inspect(model, visible=visible)
    costs, laid = costs_of(model, found), all(graph.end_to_end for graph in found.graphs)
    of_teacher = costs
    if teacher is not None:
        teacher = build_on_meta(teacher) if isinstance(teacher, PretrainedConfig) else teacher
        of_teacher = costs_of(teacher, inspect(teacher))
    kept = [int(count_of(s.answer, config.keep)) for s in counted]
    dense = 3 * sum(costs.forward(s.total, s.total) for s in counted)
    everywhere = config.logits == "all"
    full = 3 * sum(costs.forward(s.total, s.total if everywhere else s.answer) for s in counted)
    computed = [
        int(count_of(s.visual, config.visual_keep)) + s.prompt + answer_positions(s.answer, k, config)
        for s, k in zip(counted, kept, strict=True)
    ]
    sparse = 3 * sum(
        costs.forward(n, s.total if everywhere else k, s.total if visible else None)
        for s, n, k in zip(counted, computed, kept, strict=True)
    )
    steps = max(round(epochs * len(counted) * copies) if steps is None else steps, 1)
    full_share = sum(map(config.full_share, range(steps))) / steps
    asked = counted if config.uses_references else []
    reading = float(sum(of_teacher.forward(s.prompt + s.answer, s.answer) for s in asked))
    whole = _most_full(config, rows, laid=laid)
    epoch = full_share * full + (1 - full_share) * sparse
    longest = max(counted, key=lambda s: s.total)
    positions = sum(s.total for s in counted)
    sparse_activations = sum(computed) / positions
    taught = reading if full_share < 1 else 0.0  # steps that are all full ask it nothing
    run = epochs * dense / (epochs * epoch + taught)
    hours = None if flops_per_second is None else epochs * copies * dense / flops_per_second / 3600
    return Estimate(
        tokens=positions / len(counted),
        answers_share=sum(s.answer for s in counted) / positions,
        full=dense / full,
        sparse=dense / sparse,
        schedule=dense / epoch,
        teacher=reading / dense,
        run=run,
        break_even_epochs=reading / (dense - epoch) if dense > epoch else float("inf"),
        dense_flops=copies * dense,
        hours_dense=hours,
        hours=None if hours is None else hours / run,
        sparse_activations=sparse_activations,
        peak_activations=whole + (1 - whole) * sparse_activations,
        logits_bytes_dense=4 * longest.total * costs.vocabulary,
        logits_bytes_full=4
        * (longest.total * costs.vocabulary if everywhere else min(longest.answer * costs.vocabulary, CHUNK)),
        steps=steps,
        first_sparse=config.first_sparse if full_share == 1 else None,
    )


def answer_positions(answer: int, kept: int, config: Config) -> int:
    """How many of an answer's positions a sparse step computes for so many kept labels.

    With alignment="both" kept tokens that follow one another share positions; as many are taken to as would at random.
    """
    if config.alignment == "predictor":
        return kept
    return min(int(count_of(kept, 2 - kept / answer)), answer)


def _most_full(config: Config, rows: int | None, *, laid: bool) -> float:
    """The share of full rows in the largest step after warm-up; `laid`: are rows laid end to end?"""
    if config.schedule == "cycled" or config.final_full_steps or not laid:
        return float(config.full_steps + config.final_full_steps > 0)
    share = config.full_steps / config.cycle
    return share if rows is None else int(count_of(rows, share)) / rows


def costs_of(model: nn.Module, found: regate_patch.Statistics) -> Costs:
    """The costs of a model's decoder, from what was found in it, and of its head."""
    weight = _projection(model)
    return Costs(found, head=2.0 * weight.numel(), vocabulary=weight.shape[0])


def inspect(model: nn.Module, *, visible: bool = False) -> regate_patch.Statistics:
    """What the engine finds in a model's decoder; the model may have no weights (be on the "meta" device).

    Raises:
        UnknownArchitectureError: no adapter serves the model, or its decoder does not run on embeddings.
    """
    with served():
        adapter = find_adapter(model)
        decoder = adapter.decoder(model)
        weight = _projection(model)
    inputs = torch.zeros(2, 64, text_config(model).hidden_size, device=weight.device, dtype=weight.dtype)
    mask = torch.ones(2, 64, device=weight.device, dtype=torch.int64)
    call: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": mask, "use_cache": False}
    try:
        signature(decoder).bind(**call)
    except TypeError as error:
        raise UnknownArchitectureError(
            f"the {type(decoder).__name__} of {type(model).__name__} is no decoder that runs on embeddings and a mask "
            f"({error}). ReGATE is for causal language models; encoders, such as BERT, are none"
        ) from error
    with adapter.followable(model, decoder):
        return regate_patch.inspect(decoder, **call, visible=visible)


def _projection(model: nn.Module) -> Tensor:
    """The weights of the head, [V, D]."""
    return next(p for p in find_adapter(model).head(model).parameters() if p.dim() == 2)


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """The model of a configuration, without weights."""
    with torch.device("meta"):
        for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
            if type(config) in kind._model_mapping:
                return kind.from_config(config)
    raise UnknownArchitectureError(
        f"transformers has no image-text-to-text or causal language model for {type(config).__name__}"
    )


def count_tokens(model: nn.Module, batches: Iterable[Batch]) -> list[Sample]:
    """Token counts of every sample of a data loader, for `estimate`; also of several in a row.

    Raises:
        UnknownArchitectureError: no adapter serves the model, or the adapter cannot read a batch.
        LabelsError, PackedRowsError: see `on_host`.
    """
    with served():
        adapter, vocabulary = find_adapter(model), len(_projection(model))
    found: list[Any] = []
    for batch in batches:
        with served():
            layout = adapter.layout(model, batch)
        layout, segments, _ = on_host(batch, layout, vocabulary=vocabulary)
        layout = segments.unpack_layout(layout)
        answer = layout.labels != IGNORED
        prompt = layout.valid & ~layout.visual & ~answer
        columns = [x.sum(1).tolist() for x in (layout.visual & layout.valid & ~answer, prompt, answer)]
        found += [Sample(*row) for row in zip(*columns, strict=True)]
    return [sample for sample in found if sample.answer]
