"""What ReGATE must know about an architecture: a few pure functions, each with a default that serves
conventional Hugging Face models. An adapter overrides the ones that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model_adapters import conventional, visual
from model_adapters.attention import followable_attention
from model_adapters.checkpointing import followable_checkpoints
from model_adapters.flash import followable_calls
from model_adapters.recording import followable_recording

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Padding:
    """How the text-only teacher sees a visual position.

    Attributes:
        token_id: the placeholder; None takes the model's pad token (or its end-of-sequence token, or 0).
        attend: may text attend to the placeholders? If not, they are left out of the teacher's compute.
    """

    token_id: int | None = None
    attend: bool = False


@dataclass(frozen=True)
class Layout:
    """One batch as the decoder sees it. All [B, S] (S decoder positions, after visual expansion).

    Attributes:
        input_ids: int64; at visual positions any id.
        labels: int64, -100 where unsupervised; position j predicts `labels[:, j + 1]`.
        valid: bool, False on padding.
        visual: bool, True where an image, video or audio feature stands.
        call: the arguments with which the model is then called, where expanding the visual tokens has made others
            of the batch; None where it is called with the batch as it came.
        items: how many images, videos or sounds each row has, where the adapter has counted them.
    """

    input_ids: Tensor
    labels: Tensor
    valid: Tensor
    visual: Tensor
    call: Batch | None = None
    items: tuple[int, ...] | None = None


def conventional_layout(model: nn.Module, batch: Batch) -> Layout:
    """The default of `ModelAdapter.layout`."""
    fields: dict[str, Any] = dict(conventional.layout(model, batch))
    return Layout(**fields)


def labels_alone(model: nn.Module, call: Batch, labels: Tensor) -> dict[str, Any]:
    """The default of `ModelAdapter.with_labels`."""
    return {"labels": labels}


@dataclass(frozen=True)
class ModelAdapter:
    """How to serve one architecture.

    Attributes:
        serves: `config.model_type`s or class names of the models it serves.
        causal_lm: the module whose call receives `labels` aligned with decoder positions.
        decoder: the module that owns the decoder layers; what the engine captures.
        embeddings, head: ids to embeddings, final hidden states to logits; what the teacher needs besides
            the decoder.
        layout: the batch (the keyword arguments of `causal_lm`'s call) as a `Layout`.
        with_labels: `(model, call, labels [B, S])`: what to change in the call so that the model learns from these
            labels alone, -100 elsewhere.
        position_ids: what the decoder is given as `position_ids`, or None where it makes them itself.
        run_decoder: `(decoder, embeddings, input_ids [B, S], attention_mask [B, S], position_ids) -> hidden states`
            [B, S, D] on text with placeholders at visual positions, given the decoder and the embeddings module,
            for the teacher.
        capturable: a context in which the decoder computes the same function by code that can be captured as one graph,
            for the few models whose own code cannot.
        in_step: does the model's forward talk to other ranks, so that all must run it equally often?
        padding: how the teacher sees visual positions.
        visual_inputs: names of the batch's entries that hold pixels or sound, for telling samples of equal text apart:
            tensors, or lists of them of any nesting.
        visual_axis: their axis along which images, or what they are cut into, follow one another.
        visual_rows: `(model, batch, layout) -> {name: places}`: where visual inputs stand, and rows of their tables of
            sizes. The batch that it is given is on the host, each visual input a `visual.Seen`. Places are int64 [N] or
            [N, M], like the first axes of the input: `row * S + position`, that of the first placeholder; -1 for what
            stands nowhere. None instead of a tensor: it cannot be told.
    """

    serves: tuple[str, ...]
    causal_lm: Callable[[nn.Module], nn.Module] = conventional.causal_lm
    decoder: Callable[[nn.Module], nn.Module] = conventional.decoder
    embeddings: Callable[[nn.Module], nn.Module] = conventional.embeddings
    head: Callable[[nn.Module], nn.Module] = conventional.head
    layout: Callable[[nn.Module, Batch], Layout] = conventional_layout
    with_labels: Callable[[nn.Module, Batch, Tensor], dict[str, Any]] = labels_alone
    position_ids: Callable[[nn.Module, Batch], Tensor | None] = conventional.position_ids
    run_decoder: Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor | None], Tensor] = conventional.run_decoder
    capturable: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext()
    in_step: bool = False
    padding: Padding = Padding()
    visual_inputs: tuple[str, ...] = visual.INPUTS
    visual_axis: int = 0
    visual_rows: Callable[[nn.Module, Batch, Layout], Mapping[str, Tensor | None]] = visual.visual_rows

    @contextmanager
    def followable(self, model: nn.Module, decoder: nn.Module) -> Iterator[None]:
        """Inside, the decoder of `model`, or this copy of it, runs code of the same function that can be followed."""
        with (
            self.capturable(model),
            followable_attention(model, decoder),
            followable_calls(decoder),
            followable_checkpoints(decoder),
            followable_recording(),
        ):
            yield
