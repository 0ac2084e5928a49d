"""What a training step must compute at least, in FLOPs, and how long a GPU needs for it at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks import arms
from benchmarks.models import causal_lm
from benchmarks.workloads import VISUAL_ID
from model_adapters import Layout
from regate import Config
from regate.labels import predicted
from regate.scoring.decision import Decision

# Dense bfloat16 FLOPs and bytes of memory per second, from the vendor's data sheets (SXM).
_PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.0e12)}


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a decoder's training step: products with weights, causal attention, and the vocabulary projection; after
    the last attention, products with weights only where the vocabulary projection reads.

    Attributes:
        per_position, after_attention, per_logit: forward, of the layers' weights, of those after the last attention,
            and of the vocabulary projection.
        per_key: forward, of the weights that make keys and values.
        per_pair: forward, of attention for a pair of positions one of which sees the other.
        weights: passes over products with weights, forward, backward and recomputed ones.
        attention: passes over attention.
        head: passes over the vocabulary projection.
    """

    per_position: float
    after_attention: float
    per_logit: float
    per_key: float
    per_pair: float
    weights: int
    attention: int
    head: int

    @classmethod
    def of(cls, model: nn.Module) -> Arithmetic:
        """Of a model from `benchmarks.models`."""
        inner = causal_lm(model)
        config, layers = inner.config, inner.model.layers
        frozen, recomputed = inner is not model, bool(getattr(layers[0], "gradient_checkpointing", False))
        last = layers[-1]
        return cls(
            per_position=2.0 * _products(layers),
            after_attention=2.0 * (_products(last.self_attn.o_proj) + _products(last.mlp)),
            per_logit=2.0 * inner.lm_head.weight.numel(),
            per_key=2.0 * sum(_products(p) for x in layers for p in (x.self_attn.k_proj, x.self_attn.v_proj)),
            per_pair=4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim,
            weights=(2 if frozen else 3) + recomputed,  # no gradient of frozen weights
            attention=3 + recomputed,
            head=2 if frozen else 3,
        )

    def flops(self, positions: int, predictions: int, seen: int | None = None) -> float:
        """Of a row with so many positions, of which so many are projected onto the vocabulary; and which see so many,
        those that are not computed evenly among them."""
        unread, still = self.after_attention * (positions - predictions), 0 if seen is None else seen - positions
        keys = self.weights * self.per_key * still + self.attention * self.per_pair * positions * still / 2
        return self.whole(positions, predictions) - self.weights * unread + keys

    def whole(self, positions: int, predictions: int) -> float:
        """The same with all of the last layer at every position, as dense models compute it."""
        attention = self.per_pair * positions**2 / 2
        layers = self.weights * self.per_position * positions + self.attention * attention
        return layers + self.head * self.per_logit * predictions


def decided(data: dict[str, Tensor], kept: Tensor) -> dict[str, Decision]:
    """What each kind of step computes of a batch of which these labels are kept."""
    ids, labels, valid = (data[name].cpu() for name in ("input_ids", "labels", "attention_mask"))
    layout = Layout(ids, labels, valid.bool(), ids == VISUAL_ID)

    def decide(kept: Tensor, config: Config, *, full: bool) -> Decision:
        return Decision.of(layout, kept.cpu(), config, full=full, beyond=False)

    every = predicted(labels)
    return {
        "full": decide(every, arms.SPARSE_AFTER_ONE, full=True),
        "exact": decide(every, arms.EXACT, full=False),
        "sparse": decide(kept, arms.SPARSE_AFTER_ONE, full=False),
        "thinned": decide(kept, arms.THINNED, full=False),
        "half": decide(kept, arms.HALF, full=False),
        "quarter": decide(kept, arms.QUARTER, full=False),
    }


def needed(arithmetic: Arithmetic, data: dict[str, Tensor], kept: Tensor) -> dict[str, float]:
    """FLOPs of a dense step on the padded batch; of one on valid positions alone, with logits at labels alone
    ("unpadded"); and those that steps of `decided` need."""
    rows, length = data["labels"].shape
    positions, labels = data["attention_mask"].sum(1).tolist(), predicted(data["labels"]).sum(1).tolist()
    found = {
        "dense": rows * arithmetic.flops(length, length),
        "unpadded": sum(arithmetic.whole(n, m) for n, m in zip(positions, labels, strict=True)),
    }
    for kind, step in decided(data, kept).items():
        seen = positions if kind in ("half", "quarter") else step.computed
        found[kind] = sum(arithmetic.flops(n, m, s) for n, m, s in zip(step.computed, step.read, seen, strict=True))
    return found


def roofline(flops: float, trained: int, gpu: str) -> float | None:
    """Seconds that a GPU needs at least for a step of `flops` and AdamW on so many bfloat16 parameters: each part at
    the peak of what bounds it; None for a GPU that is not known."""
    peak: Any = next((numbers for name, numbers in _PEAKS.items() if name in gpu), None)
    if peak is None:
        return None
    moved = 7 * 2 * trained  # weights, gradients and two moments are read, all but gradients written
    return flops / peak[0] + moved / peak[1]


def _products(module: nn.Module) -> int:
    """Weights that multiply, adapters aside."""
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "lora_" not in name)
