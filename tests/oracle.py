"""Compare the engine with the per-layer masked reference on a whole multimodal model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regate_patch
from model_adapters import conventional
from regate_patch import reference


@dataclass
class Run:
    """Decoder output at active positions, its input's gradient, and every parameter's gradient."""

    output: Tensor
    input_grad: Tensor
    grads: dict[str, Tensor]


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def norms_in_double(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models compute norms in float32: where one stands twice in a graph, its gradients are rounded apart."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        scale = 1 + self.weight if "Gemma" in type(self).__name__ else self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale

    for norm in {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(norm, "forward", forward)


def random_active(batch: dict[str, Tensor], seed: int = 0, share: float = 0.6) -> Tensor:
    """[B, S] bool: random valid positions, another number in each row."""
    valid = batch["attention_mask"].bool()
    noise = torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed))
    active = (noise < share) & valid
    active |= valid & (valid.cumsum(1) == 1)  # at least the first
    return active


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The list of modules nearest to the decoder that is named as lists of decoder layers are."""
    names = ("layers", "h", "blocks", "layer")
    found = [n for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and n.rpartition(".")[2] in names]
    layers = decoder.get_submodule(min(found, key=lambda name: name.count(".")))
    assert isinstance(layers, nn.ModuleList)
    return layers


def cut_between_layers(model: nn.Module) -> None:
    """Hooks that nobody can capture, as where parameters are sharded: each layer becomes a graph of its own."""
    for layer in layers_of(conventional.decoder(model)):
        layer.register_forward_pre_hook(torch.compiler.disable(lambda *_: None))


def run(model: nn.Module, batch: dict[str, Tensor], scope: Any, active: Tensor) -> Run:
    """One forward and backward under `scope`, of a random function of the decoder's active outputs."""
    decoder = conventional.decoder(model)
    seen: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["input"] = kwargs["inputs_embeds"]
        seen["input"].retain_grad()

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        seen["output"] = output[0]

    model.zero_grad(set_to_none=True)
    hooks = [
        decoder.register_forward_pre_hook(keep_input, with_kwargs=True),
        decoder.register_forward_hook(keep_output),
    ]
    try:
        with scope:
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    weight = torch.randn(seen["output"].shape, generator=torch.Generator().manual_seed(1)).to(seen["output"])
    (seen["output"] * weight * active[..., None]).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grad = seen["input"].grad
    assert grad is not None
    return Run(seen["output"].detach() * active[..., None], grad, grads)


def engine(
    model: nn.Module,
    batch: dict[str, Tensor],
    active: Tensor,
    *,
    backend: str = "eager",
    visible: Tensor | None = None,
    **options: Any,
) -> Run:
    handle = regate_patch.patch(conventional.decoder(model), backend=backend, **options)
    chosen = replace(regate_patch.Active.from_mask(active), visible=visible)
    try:
        return run(model, batch, regate_patch.active(chosen), active)
    finally:
        handle.remove()


def masked(model: nn.Module, batch: dict[str, Tensor], active: Tensor, *, visible: Tensor | None = None) -> Run:
    layers = layers_of(conventional.decoder(model))
    return run(model, batch, reference.masked(layers, active, visible), active)


def dense(model: nn.Module, batch: dict[str, Tensor], active: Tensor) -> Run:
    return run(model, batch, contextlib.nullcontext(), active)


def assert_same(a: Run, b: Run, *, tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance` times the largest entry (at least one)."""
    assert a.grads.keys() == b.grads.keys()
    pairs = {"output": (a.output, b.output), "input": (a.input_grad, b.input_grad)}
    pairs |= {name: (grad, b.grads[name]) for name, grad in a.grads.items()}
    for name, (got, expected) in pairs.items():
        atol = tolerance * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
