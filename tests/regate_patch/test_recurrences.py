"""Layers that run along the sequence other than by attention: defined as run over the active positions in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate_patch

LENGTH = 23


def _chunked_sum(x: Tensor, chunk: int = 8) -> Tensor:
    """A cumulative sum in chunks, with a Python loop over them: as chunked linear attention is written."""
    length = x.shape[1]
    pad = (chunk - length % chunk) % chunk
    chunks = F.pad(x, (0, 0, 0, pad)).reshape(x.shape[0], -1, chunk, x.shape[-1])
    state, out = torch.zeros_like(x[:, 0]), []
    for i in range((length + pad) // chunk):
        out.append(state[:, None] + chunks[:, i].cumsum(1))
        state = out[-1][:, -1]
    return torch.stack(out, 1).reshape(x.shape[0], -1, x.shape[-1])[:, :length]


RECURRENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "cumulative sum": lambda x: x.cumsum(1),
    "chunked": _chunked_sum,
    "shift": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
    "shift of what is left": lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)),
    "left-padded convolution": lambda x: F.conv1d(F.pad(x.mT, (2, 0)), torch.ones(8, 1, 3).to(x), groups=8).mT,
    "cut convolution": lambda x: F.conv1d(x.mT, torch.ones(8, 1, 3).to(x), padding=2, groups=8)[..., : x.shape[1]].mT,
}


class _Decoder(nn.Module):
    """Recurrence, MLP, attention without a residual addition after it; or the recurrence alone."""

    def __init__(self, recurrence: Callable[[Tensor], Tensor], *, attention: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrence, self.attention = recurrence, attention
        self.into, self.mlp, self.qkv = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.recurrence(self.into(hidden_states))
        x = x + self.mlp(x).relu()
        if not self.attention:
            return x
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


CASES = [
    *(pytest.param(run, attention, id=f"{name}-{attention}") for name, run in RECURRENCES.items()
      for attention in (True, False)),
    pytest.param(lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1), True, id="shift behind zeros-True"),
]  # fmt: skip


@pytest.mark.parametrize(("recurrence", "attention"), CASES)
def test_runs_over_the_active_positions_in_order(recurrence: Callable[[Tensor], Tensor], attention: bool) -> None:
    decoder = _Decoder(recurrence, attention=attention).double()
    x = torch.randn(3, LENGTH, 8, dtype=torch.double, requires_grad=True)
    active = torch.rand(3, LENGTH) < 0.5
    active[:, 0] = True
    expected = torch.cat([decoder(x[row : row + 1, keep])[0] for row, keep in enumerate(active)])
    handle = regate_patch.patch(decoder, backend="eager", padding_elided=True)
    with regate_patch.active(active):
        got = decoder(x)[active]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), [x, *decoder.parameters()], allow_unused=True),
        torch.autograd.grad(expected.square().sum(), [x, *decoder.parameters()], allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert (handle.statistics.attention, handle.statistics.mlp) == ((2, 1) if attention else (1, 1))
