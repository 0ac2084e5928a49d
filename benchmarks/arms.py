"""The ways of training that are compared: each is one step on one batch, from the same weights.

Every arm is a callable `(batch, labels kept [B, S]) -> None` that does forward, backward and AdamW's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import regate
from benchmarks.workloads import VISUAL_ID
from regate.selection import active_positions
from regate_patch.context import Active

Batch = dict[str, Tensor]
Step = Callable[[Batch, Tensor], None]
SPARSE_AFTER_ONE = regate.Config(warmup=1, cycle=1_000_000, full_steps=0)  # step 0 is full, all others sparse
THINNED = replace(SPARSE_AFTER_ONE, visual_keep=0.5)


class MultimodalForCausalLM(LlamaForCausalLM):
    """A Llama whose decoder is given embeddings, as multimodal models give them."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> Any:
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids), labels=labels, **others)


def decoder(layers: int, width: int, vocabulary: int, *, device: str, dtype: torch.dtype) -> MultimodalForCausalLM:
    """With random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    config.image_token_id = VISUAL_ID
    return MultimodalForCausalLM(config).to(device, dtype).train()


class Trained:
    """A model with its optimizer."""

    def __init__(self, model: nn.Module, called: Any = None) -> None:
        self.model, self.called = model, model if called is None else called
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(self, batch: Batch) -> None:
        self.called(**batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def dense(model: nn.Module, *, compiled: bool) -> Step:
    trained = Trained(model, torch.compile(model) if compiled else model)
    return lambda batch, kept: trained.step(batch)


def loss_masking(model: nn.Module, *, compiled: bool) -> Step:
    """Labels that are not kept enter no loss, and everything is computed all the same."""
    trained = Trained(model, torch.compile(model) if compiled else model)
    return lambda batch, kept: trained.step(batch | {"labels": torch.where(kept, batch["labels"], -100)})


def gated(
    model: nn.Module, *, backend: str, config: regate.Config = SPARSE_AFTER_ONE
) -> tuple[Step, Step, regate.Gate]:
    """ReGATE's full and its sparse step; scores are difficulties alone, so that no teacher is timed."""
    gate = regate.apply(model, config, teacher=None, backend=backend)
    trained = Trained(model)

    def at(step: int) -> Step:
        def run(batch: Batch, kept: Tensor) -> None:
            gate.step = step
            trained.step(batch)

        return run

    return at(0), at(1), gate


def per_layer_gather(model: nn.Module, *, compiled: bool) -> Step:
    """The naive implementation: every layer picks the active positions, computes them, and puts them back."""
    chosen: dict[str, Tensor] = {}

    def wrap(layer: nn.Module) -> None:
        original = layer.forward

        def forward(hidden_states: Tensor, **others: Any) -> Tensor:
            if "index" not in chosen:
                return original(hidden_states, **others)
            index, valid = chosen["index"], chosen["valid"]
            rows = torch.arange(len(index), device=index.device)[:, None]
            cos, sin = (x.expand(len(index), -1, -1)[rows, index] for x in others["position_embeddings"])
            k = index.shape[1]
            mask = torch.ones(k, k, dtype=torch.bool, device=index.device).tril() & valid[:, None, None, :]
            mask = mask | ~valid[:, None, :, None]
            inner = hidden_states[rows, index]
            out = original(inner, **{**others, "position_embeddings": (cos, sin), "attention_mask": mask})
            result = hidden_states.clone()
            result[rows, index] = torch.where(valid[..., None], out, inner)
            return result

        layer.forward = forward  # type: ignore[method-assign]

    for layer in model.model.layers:  # type: ignore[union-attr]
        wrap(layer)  # type: ignore[arg-type]
    trained = Trained(model, torch.compile(model) if compiled else model)

    def run(batch: Batch, kept: Tensor) -> None:
        active = Active.from_mask(active_positions(batch["labels"], kept, batch["attention_mask"].bool()))
        chosen.update(index=active.index, valid=active.valid)
        trained.step(batch | {"labels": torch.where(kept, batch["labels"], -100)})

    return run


@contextlib.contextmanager
def saved_bytes() -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps for the backward pass, each storage once; parameters aside."""
    seen: dict[int, int] = {}
    found = {"bytes": 0}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter) and not (x.is_leaf and x.requires_grad):
            storage = x.untyped_storage()
            seen.setdefault(storage.data_ptr(), storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
    found["bytes"] = sum(seen.values())
