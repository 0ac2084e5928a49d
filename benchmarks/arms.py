"""The ways of training that are compared: each is one step on one batch, from the same weights.

A step is a callable `(batch, labels kept [B, S]) -> None` that does forward, backward and AdamW's step. What makes it
takes a model and a backend; several steps may share a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import regate
from benchmarks import opponents
from benchmarks.models import causal_lm
from regate.scoring.selection import active_positions
from regate_patch.context import Active

Batch = dict[str, Tensor]
Step = Callable[[Batch, Tensor], None]
Maker = Callable[[nn.Module, str], dict[str, Step]]
SPARSE_AFTER_ONE = regate.Config.paper(warmup=1, cycle=1_000_000, full_steps=0)  # step 0 is full, all others sparse
THINNED = replace(SPARSE_AFTER_ONE, visual_keep=0.5)
HALF, QUARTER = (replace(SPARSE_AFTER_ONE, visual_keep=share, elided="visible") for share in (0.5, 0.25))
EXACT = regate.Config.exact(warmup=1, cycle=1_000_000, full_steps=0)


class Trained:
    """A model with its optimizer."""

    def __init__(self, model: nn.Module, backend: str = "eager") -> None:
        self.model = torch.compile(model) if backend == "inductor" else model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def step(self, batch: opponents.Batch, forward: nn.Module | None = None) -> None:
        """With `forward` in the place of the model: a module that has its weights."""
        forward = self.model if forward is None else forward  # a compiled module has a length that cannot be asked for
        forward(**batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def dense(model: nn.Module, backend: str) -> dict[str, Step]:
    """Every label and every position: padded, and as a careful user has it (`opponents`); and, with the same weights, a
    loss that labels not kept do not enter (Rho-1)."""
    trained = Trained(model, backend)
    padded, at_labels = trained.model, opponents.AtLabels(model)
    if backend == "inductor":
        at_labels.compile()
    config = causal_lm(model).config
    kernel = config._attn_implementation

    def step(forward: nn.Module, kernel: str, collated: Callable[[Batch], opponents.Batch] = lambda x: x) -> Step:
        def run(batch: Batch, kept: Tensor) -> None:
            config._attn_implementation = kernel
            trained.step(collated(batch), forward)

        return run

    once, of_padded = opponents.Once, step(padded, kernel)
    return {
        "dense": of_padded,
        "dense, logits at labels": step(at_labels, kernel, once(opponents.labelled)),
        "dense, end to end": step(padded, opponents.KERNEL, once(opponents.laid)),
        "dense, both": step(at_labels, opponents.KERNEL, once(opponents.laid, opponents.labelled)),
        "loss masking": lambda batch, kept: of_padded(_masked(batch, kept), kept),
    }


def optimizer_alone(model: nn.Module, backend: str) -> dict[str, Step]:
    """What every arm pays alike: AdamW's step."""
    trained = Trained(model)
    for parameter in trained.parameters:
        parameter.grad = torch.zeros_like(parameter)
    return {"AdamW alone": lambda batch, kept: trained.optimizer.step()}


def gated(model: nn.Module, backend: str) -> dict[str, Step]:
    """ReGATE's full and its sparse step."""
    steps = Gated(model, backend, SPARSE_AFTER_ONE)
    return {"regate full": steps.full, "regate sparse": steps.sparse}


def thinned(model: nn.Module, backend: str) -> dict[str, Step]:
    """A sparse step that computes half of the visual tokens."""
    return {"regate thinned": Gated(model, backend, THINNED).sparse}


def half(model: nn.Module, backend: str) -> dict[str, Step]:
    """The same, what is left out visible."""
    return {"regate half": Gated(model, backend, HALF).sparse}


def quarter(model: nn.Module, backend: str) -> dict[str, Step]:
    """A sparse step that computes a quarter of the visual tokens, what is left out visible."""
    return {"regate quarter": Gated(model, backend, QUARTER).sparse}


def exact(model: nn.Module, backend: str) -> dict[str, Step]:
    """ReGATE with dense training's numbers: every label kept, as in the steps after its warm-up."""
    return {"regate exact": Gated(model, backend, EXACT).sparse}


class Gated:
    """A model under a gate; scores are difficulties alone, so that no teacher is timed."""

    def __init__(self, model: nn.Module, backend: str, config: regate.Config = SPARSE_AFTER_ONE) -> None:
        self.gate = regate.apply(model, config, teacher=None, backend=backend)
        self.trained = Trained(model)

    def full(self, batch: Batch, kept: Tensor) -> None:
        self.gate.step = 0
        self.trained.step(batch)

    def sparse(self, batch: Batch, kept: Tensor) -> None:
        self.gate.step = 1
        self.trained.step(batch)


def gate_of(step: Step) -> regate.Gate | None:
    """The gate that a step trains under, if any."""
    owner = getattr(step, "__self__", None)
    return owner.gate if isinstance(owner, Gated) else None


class _Some(nn.Module):
    """A decoder layer that computes some positions and leaves the others as they are; None computes all."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.index: Tensor | None = None  # [B or 1, K]
        self.mask: Tensor | None = None  # [B or 1, 1, K, K] bool

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        if self.index is None:
            return self.layer(hidden_states, **others)
        index = self.index.expand(len(hidden_states), -1)
        rows = torch.arange(len(index), device=index.device)[:, None]
        cos, sin = (x.expand(len(index), -1, -1)[rows, index] for x in others.pop("position_embeddings"))
        inner = self.layer(
            hidden_states[rows, index], **{**others, "position_embeddings": (cos, sin), "attention_mask": self.mask}
        )
        result = hidden_states.clone()
        result[rows, index] = inner
        return result


def per_layer_gather(model: nn.Module, backend: str) -> dict[str, Step]:
    """The naive implementation of the same choice: every layer picks its positions, computes them, puts them back."""
    layers = _some(model)
    trained = Trained(model, backend)

    def run(batch: Batch, kept: Tensor) -> None:
        valid = batch["attention_mask"].bool()
        active = Active.from_mask(active_positions(batch["labels"], kept, valid, alignment=SPARSE_AFTER_ONE.alignment))
        k = active.index.shape[1]
        causal = torch.ones(k, k, dtype=torch.bool, device=active.index.device).tril()
        mask = causal & active.valid[:, None, None, :] | ~active.valid[:, None, :, None]
        for layer in layers:
            layer.index, layer.mask = active.index, mask
        trained.step(_masked(batch, kept))

    return {"per-layer gather": run}


def random_ltd(model: nn.Module, backend: str) -> dict[str, Step]:
    """Random layerwise token dropping (arXiv 2211.11586), as DeepSpeed does it: each layer but the first and the last
    draws positions of its own, the same for every row, and the causal mask is cut to their number. As many positions as
    a sparse step has; all labels enter the loss."""
    layers = _some(model)[1:-1]
    trained = Trained(model, backend)
    random = torch.Generator().manual_seed(0)

    def run(batch: Batch, kept: Tensor) -> None:
        valid = batch["attention_mask"].bool()
        active = active_positions(batch["labels"], kept, valid, alignment=SPARSE_AFTER_ONE.alignment)
        length, k = active.shape[1], int(active.sum(1).max())
        mask = torch.ones(1, 1, k, k, dtype=torch.bool, device=active.device).tril()
        for layer in layers:
            drawn = torch.randperm(length, generator=random)[:k].sort().values
            layer.index, layer.mask = drawn[None].to(active.device), mask
        trained.step(batch)

    return {"random-LTD": run}


def liger(model: nn.Module, backend: str) -> dict[str, Step]:
    """Dense, with Liger Kernel's fused kernels, padded and as a careful user has it."""
    _use_liger(model)
    steps = dense(model, backend)
    return {"liger": steps["dense"], "liger, both": steps["dense, both"]}


def liger_gated(model: nn.Module, backend: str) -> dict[str, Step]:
    """ReGATE on a model with Liger Kernel's fused kernels."""
    _use_liger(model)
    return {f"{name} + liger": step for name, step in gated(model, backend).items()}


# Those with Liger Kernel come last: it replaces functions of whole modules.
MAKERS: tuple[Maker, ...] = (
    dense, optimizer_alone, per_layer_gather, random_ltd, gated, exact, thinned, half, quarter, liger, liger_gated,
)  # fmt: skip


def _use_liger(model: nn.Module) -> None:
    from liger_kernel.transformers import (
        apply_liger_kernel_to_llama,
        apply_liger_kernel_to_qwen2,
        apply_liger_kernel_to_qwen3,
    )

    inner = causal_lm(model)
    kinds = {
        "llama": apply_liger_kernel_to_llama,
        "qwen2": apply_liger_kernel_to_qwen2,
        "qwen3": apply_liger_kernel_to_qwen3,
    }
    kinds[inner.config.model_type](model=inner)


def _masked(batch: Batch, kept: Tensor) -> Batch:
    return batch | {"labels": torch.where(kept, batch["labels"], -100)}


def _some(model: nn.Module) -> list[_Some]:
    layers = causal_lm(model).model.layers
    for i, layer in enumerate(layers):
        layers[i] = _Some(layer)
    return list(layers)


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
