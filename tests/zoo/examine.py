"""Hold one member of the zoo to the oracle.

The oracle here: each row of the batch goes through the model alone, and each decoder layer gets only that row's
active positions, together with what belongs to them of every other argument. Nothing is masked and nothing is
captured, so it also defines what layers mean that are not attention: they run over the active positions in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import regate
import regate_patch
from model_adapters import AdapterError, find_adapter
from tests.oracle import double, layers_of, random_active
from tests.zoo.common import Specimen

Batch = dict[str, Tensor]
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)


@dataclass
class Run:
    """The decoder's result at active positions, row after row, and every parameter's gradient."""

    output: Tensor
    grads: dict[str, Tensor]


@dataclass
class Findings:
    """One member's row in the table. Differences are the largest, relative to the largest entry."""

    name: str
    layers: str = ""
    attention: int = 0
    mlp: int = 0
    recurrences: int = 0
    graphs: int = 0
    difference: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    failed: str = ""

    tolerance: float = 1e-5

    @property
    def exact(self) -> bool:
        return (
            not (self.refused or self.failed)
            and bool(self.difference)
            and max(self.difference.values()) < self.tolerance
        )


def first(output: Any) -> Tensor:
    """The hidden states among a decoder's results."""
    return output if isinstance(output, Tensor) else output[0]


def run(model: nn.Module, decoder: nn.Module, batches: list[tuple[Batch, Tensor]]) -> Run:
    """Forward and backward of a random function of the decoder's outputs at active positions.

    Args:
        batches: pairs of a batch and its active positions [B, S]; results are joined in order.
    """
    model.zero_grad(set_to_none=True)
    outputs: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, output: outputs.append(first(output)))
    kept = []
    try:
        for batch, active in batches:
            model(**{k: v for k, v in batch.items() if k != "labels"}, **_no_cache(model))
            kept.append(outputs.pop()[active])
    finally:
        hook.remove()
    output = torch.cat(kept)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    (output * weight).sum().backward()
    return Run(output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def _no_cache(model: nn.Module) -> dict[str, bool]:
    config = getattr(model, "config", None)
    return {"use_cache": False} if hasattr(config, "get_text_config") else {}


class _OriginalPositions(TorchFunctionMode):
    """Layers that count positions themselves get the original ones: `arange(K)` is the active positions."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.positions = positions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.arange and torch.equal(result, torch.arange(len(self.positions)).to(result)):
            return self.positions.to(result)
        return result


@contextlib.contextmanager
def compacted(layers: nn.ModuleList, active: Tensor) -> Iterator[None]:
    """Layers that see only the active positions [S] of a batch of one row, and leave the others as they are."""
    positions = active.nonzero().squeeze(1)

    def shorten(x: Any) -> Any:
        if isinstance(x, Tensor):
            for axis in range(x.dim()):
                if x.shape[axis] == len(active):
                    x = x.index_select(axis, positions)
        return x

    def shorten_all(x: Any) -> Any:  # but not in mappings: what layers share through one is short already
        return pytree.tree_map(shorten, x, is_leaf=lambda leaf: isinstance(leaf, dict))

    def shortened(layer: nn.Module) -> Any:
        forward = layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            with _OriginalPositions(positions):
                output = forward(*map(shorten_all, args), **{k: shorten_all(v) for k, v in kwargs.items()})
            axis = list(stream.shape).index(len(active))
            full = stream.index_copy(axis, positions, first(output))
            return (full, *output[1:]) if isinstance(output, tuple) else full

        return call

    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = shortened(layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def alone(model: nn.Module, decoder: nn.Module, pieces: list[tuple[Batch, Tensor]]) -> Run:
    """The oracle: see the module's description. `pieces` are batches of one row, with its active positions [S]."""
    model.zero_grad(set_to_none=True)
    outputs: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, args, output: outputs.append(first(output)))
    kept = []
    try:
        for piece, row in pieces:
            with compacted(layers_of(decoder), row):
                model(**{k: v for k, v in piece.items() if k != "labels"}, **_no_cache(model))
            kept.append(outputs.pop()[0][row])
    finally:
        hook.remove()
    output = torch.cat(kept)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    (output * weight).sum().backward()
    return Run(output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def gated(model: nn.Module, decoder: nn.Module, batch: Batch, active: Tensor) -> tuple[Run, regate_patch.Handle]:
    handle = regate_patch.patch(decoder, backend="eager", padding_elided=True)  # as the gate does
    try:
        with regate_patch.active(active), find_adapter(model).followable(model, decoder):
            return run(model, decoder, [(batch, active)]), handle
    finally:
        handle.remove()


def difference(got: Run, expected: Run) -> float:
    """Largest difference over all tensors, each relative to its largest entry.

    A tensor whose entries are below 1% of the largest counts relative to that: the gradient of a key's bias is zero
    up to rounding.
    """
    missing = got.grads.keys() ^ expected.grads.keys()
    for name in missing:
        run_ = got if name in got.grads else expected
        assert not run_.grads[name].any(), f"{name} has a gradient in one run only"
    pairs = [(got.grads[n], expected.grads[n]) for n in got.grads.keys() & expected.grads.keys()]
    largest = max(float(b.abs().max()) for _, b in pairs)
    pairs += [(got.output, expected.output)]
    return max(float((a - b).abs().max()) / max(0.01 * largest, float(b.abs().max())) for a, b in pairs)


def examine(name: str, specimen: Specimen) -> Findings:
    """Identity, random positions, the same with gradient checkpointing, and a sparse training step."""
    findings = Findings(name)
    model = specimen.double()
    try:
        decoder = find_adapter(model).decoder(model)
        findings.layers = f"{len(layers_of(decoder))} x {type(layers_of(decoder)[0]).__name__}"
        _engine(model, decoder, specimen, findings)
        _step(specimen, findings)
    except (regate.RegateError, AdapterError) as error:
        findings.refused = f"{type(error).__name__}: {error}"
    return findings


def _engine(model: nn.Module, decoder: nn.Module, specimen: Specimen, findings: Findings) -> None:
    batch = cast(specimen.batch("none"), specimen)
    every = _valid(model, batch)
    got, handle = gated(model, decoder, batch, every)
    findings.difference["identity"] = difference(got, run(model, decoder, [(batch, every)]))
    statistics = handle.statistics
    findings.attention, findings.mlp = statistics.attention, statistics.mlp
    findings.recurrences = sum(graph.recurrences for graph in statistics.last)
    findings.graphs = len(statistics.graphs) + statistics.other_graphs
    batch = cast(specimen.batch("right", seed=1), specimen)
    active = random_active({"attention_mask": _valid(model, batch)})
    pieces = zip(specimen.split(batch, len(active)), active, strict=True)
    expected = alone(model, decoder, list(pieces))
    torch._dynamo.reset()
    findings.difference["random positions"] = difference(gated(model, decoder, batch, active)[0], expected)
    if getattr(model, "supports_gradient_checkpointing", False):
        torch._dynamo.reset()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        findings.difference["checkpointing"] = difference(gated(model, decoder, batch, active)[0], expected)
        model.gradient_checkpointing_disable()


def _valid(model: nn.Module, batch: Batch) -> Tensor:
    return find_adapter(model).layout(model, batch).valid


def _step(specimen: Specimen, findings: Findings) -> None:
    """One sparse training step by the one line of the README; its gradient against the oracle's."""
    torch._dynamo.reset()
    model = specimen.double()
    batch = cast(specimen.batch("right", seed=2), specimen)
    gate = regate.apply(model, SPARSE, backend="eager")
    loss = model(**batch).loss
    loss.backward()
    assert gate.last is not None
    report = gate.report()
    assert report["positions_computed"] < report["positions_seen"], "nothing was elided"
    assert torch.isfinite(loss)


def cast(batch: Batch, specimen: Specimen) -> Batch:
    return double(batch) if specimen.dtype == torch.float64 else batch
