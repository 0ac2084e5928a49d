"""Putting the engine on a decoder and taking it off again."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch

import regate_patch
from tests.plain import Decoder

INDEX = torch.tensor([[0, 2, 3], [1, 4, 5]])


def test_outside_active_nothing_changes() -> None:
    decoder, x = Decoder(), torch.randn(2, 8, 16)
    before, keys = decoder(x), list(decoder.state_dict())
    regate_patch.patch(decoder, backend="eager")
    assert torch.equal(decoder(x), before)
    assert list(decoder.state_dict()) == keys


def test_remove_and_patch_again() -> None:
    decoder, x = Decoder(), torch.randn(2, 8, 16)
    before = dict(decoder.__dict__)
    first = regate_patch.patch(decoder, backend="eager")
    second = regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(INDEX):
        decoder(x)
    assert (first.statistics.calls, second.statistics.calls) == (0, 1)
    first.remove()
    assert "forward" in decoder.__dict__
    second.remove()
    second.remove()
    assert decoder.__dict__ == before


def test_copies_are_not_patched() -> None:
    decoder, x = Decoder(), torch.randn(2, 8, 16)
    regate_patch.patch(decoder, backend="eager")
    stream = io.BytesIO()
    torch.save(decoder, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(decoder), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            copied.norm.weight.mul_(2)
        with regate_patch.active(INDEX):
            assert not torch.equal(copied(x), decoder(x))
        assert copied.forward.__self__ is copied


def test_users_own_compile_does_not_lose_it() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder()
            self.head = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.decoder(x * 2))

    model, x = Model(), torch.randn(2, 8, 16)
    handle = regate_patch.patch(model.decoder, backend="eager")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with regate_patch.active(INDEX):
        torch.testing.assert_close(compiled(x), model(x))
    assert handle.statistics.calls == 2


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_hooks_are_captured_whenever_they_are_put_on(cut: bool) -> None:
    """Dynamo itself looks only after those that hung when it captured."""
    decoder, x = Decoder("broken" if cut else "pre_norm").double(), torch.randn(2, 8, 16, dtype=torch.double)
    handle = regate_patch.patch(decoder, backend="eager", allow_graph_breaks=cut)
    chosen = INDEX[..., None].expand(-1, -1, 16)

    def agree() -> None:
        with regate_patch.active(INDEX):
            computed = decoder(x).gather(1, chosen)
        torch.testing.assert_close(computed, decoder(x.gather(1, chosen)), atol=1e-12, rtol=0)

    agree()
    first = decoder.layers[0].out.register_forward_hook(lambda module, args, made: made * 1.5)
    agree()
    second = decoder.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    agree()
    for hook in (first, second):
        hook.remove()
        agree()
    decoder.layers[0].out.register_forward_hook(lambda module, args, made: made * 0.5)
    agree()
    captured = len(handle.statistics.graphs)
    assert cut or captured == 1  # those of earlier hooks are forgotten
    agree()
    assert len(handle.statistics.graphs) == captured


def test_rows_of_different_counts() -> None:
    decoder, x = Decoder().double(), torch.randn(2, 8, 16, dtype=torch.double)
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(torch.tensor([[0, 2, 3], [1, 4, -1]]), length=8):
        both = decoder(x)
    with regate_patch.active(torch.tensor([[1, 4]])):
        alone = decoder(x[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    decoder, x = Decoder().to(dtype), torch.randn(2, 8, 16, dtype=dtype)
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(INDEX):
        assert decoder(x).dtype == dtype


def test_needs_torch_alone() -> None:
    code = """
import sys
for name in ("transformers", "accelerate", "einops", "lmdb", "tqdm", "regate", "model_adapters"):
    sys.modules[name] = None
import regate_patch, regate_patch.reference
"""
    subprocess.run([sys.executable, "-c", code], check=True)
