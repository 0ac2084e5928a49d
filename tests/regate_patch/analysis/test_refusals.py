"""The engine knows when it does not know: a typed error, never a silent dense run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate_patch
from regate_patch import NoBlocksError, UnsupportedGraphError
from tests.plain import Decoder
from tests.zoo import CORE


class _With(nn.Module):
    """A one-layer decoder with something odd in its attention's input."""

    def __init__(self, odd: Callable[[Tensor], Tensor], *, residual: bool = True) -> None:
        super().__init__()
        self.odd, self.residual = odd, residual
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.odd(hidden_states)).chunk(3, -1))
        y = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return hidden_states + y if self.residual else y


def _call(decoder: nn.Module) -> Tensor:
    with regate_patch.active(torch.tensor([[0, 2], [1, 3]])):
        return decoder(torch.randn(2, 6, 8))


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: F.conv1d(x.mT, torch.ones(8, 8, 3), padding=1).mT,
    "roll": lambda x: x.roll(1, 1),
    "centred window": lambda x: F.avg_pool1d(x.mT, 3, stride=1, padding=1).mT,
    "attention without softmax": lambda x: (x @ x.mT).relu() @ x,
    "einsum over tokens": lambda x: torch.einsum("bqk,bkd->bqd", (x @ x.mT).relu(), x),
    "weights over tokens": lambda x: x * x.softmax(1),
    "scatter by number": lambda x: x.scatter(1, torch.arange(x.shape[1])[None, :, None].expand_as(x), x),
    "mean over tokens": lambda x: x - x.mean(1, keepdim=True),
    "every other token": lambda x: x[:, ::2].repeat_interleave(2, 1),
    "the highest over tokens": lambda x: x - x.max(1, keepdim=True).values,
    "the middle over tokens": lambda x: x - x.median(1, keepdim=True).values,
    "variance and mean over tokens": lambda x: x - torch.var_mean(x, 1, keepdim=True)[1],
    "least and most over tokens": lambda x: x - torch.aminmax(x, dim=1, keepdim=True).max,
    "one by rank over tokens": lambda x: x - torch.kthvalue(x, 2, 1, keepdim=True)[0],
    "where the highest is": lambda x: x + x.argmax(1, keepdim=True),
    "groups over tokens": lambda x: F.group_norm(x.mT, 4).mT,
    "norm over tokens and channels": lambda x: F.layer_norm(x, x.shape[1:]),
    "length over tokens": lambda x: F.normalize(x),
    "length over the others": lambda x: torch.renorm(x, 2, 1, 0.1),
    "einsum over the second's tokens": lambda x: torch.einsum("bsd,bte->bsd", x, x),
    "einsum with dots over tokens": lambda x: torch.einsum("...sd,...te->...sd", x, x),
    "einsum over what dots stand for": lambda x: torch.einsum("b...d,bse->bse", x, x),
    "product that is added to": lambda x: torch.baddbmm(x, (x @ x.mT).relu(), x),
    "blocks of tokens": lambda x: x + x.unflatten(1, (-1, 2)).mean(2, keepdim=True).expand(-1, -1, 2, -1).flatten(1, 2),
    "axis by NumPy's name": lambda x: x * torch.softmax(x, axis=1),
    "positions by number": lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]],
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_tokens_that_mix_outside_attention(odd: Callable[[Tensor], Tensor]) -> None:
    decoder = _With(odd)
    regate_patch.patch(decoder, backend="eager")
    with pytest.raises(UnsupportedGraphError) as error:
        _call(decoder)
    assert "test_refusals.py" in str(error.value)  # the model's source line


BY_KEYWORD: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x * F.softmax(input=x, dim=1),
    "roll": lambda x: torch.roll(input=x, shifts=1, dims=1),
    "flip": lambda x: torch.flip(dims=(1,), input=x),
    "sort": lambda x: torch.sort(input=x, dim=1).values,
    "diff": lambda x: x + F.pad(torch.diff(input=x, dim=1), (0, 0, 1, 0)),
    "topk": lambda x: x + torch.topk(input=x, k=1, dim=1).values,
    "convolution": lambda x: F.conv1d(weight=torch.ones(8, 8, 3), input=x.mT, padding=1).mT,
    "pool": lambda x: F.avg_pool1d(input=x.mT, kernel_size=3, stride=1, padding=1).mT,
    "batch": lambda x: F.batch_norm(input=x.mT, running_mean=None, running_var=None, training=True).mT,
    "instance": lambda x: F.instance_norm(input=x.mT).mT,
    "fourier": lambda x: x + torch.fft.fft(input=x, dim=1).real,
    "product": lambda x: torch.matmul(other=x, input=(x @ x.mT).relu()),
    "product with three": lambda x: torch.baddbmm(input=x, batch1=(x @ x.mT).relu(), batch2=x),
}


@pytest.mark.parametrize("odd", BY_KEYWORD.values(), ids=BY_KEYWORD.keys())
def test_they_are_seen_however_they_are_called(odd: Callable[[Tensor], Tensor]) -> None:
    regate_patch.patch(decoder := _With(odd), backend="eager")
    with pytest.raises(
        UnsupportedGraphError, match=r"cannot be computed on part of the positions(.|\n)*test_refusals.py"
    ):
        _call(decoder)


def test_attention_by_einsum_is_none_of_them() -> None:
    def attend(x: Tensor) -> Tensor:
        scores = torch.einsum("bqd,bkd->bqk", x, x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return torch.einsum("bkd,bqk->bqd", x, scores.masked_fill(hidden, float("-inf")).softmax(-1))

    x, index = torch.randn(2, 6, 8), torch.tensor([[0, 2, 3], [1, 3, 5]])
    chosen = index[..., None].expand(-1, -1, 8)
    decoder = _With(attend)
    expected = decoder(x.gather(1, chosen))
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(index):
        torch.testing.assert_close(decoder(x).gather(1, chosen), expected)


def test_a_fault_of_the_engine_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(span: object, tokens: object) -> None:
        node = next(n for n in span.nodes if "qkv" in str(n.meta.get("stack_trace")))  # type: ignore[attr-defined]
        node.args[99]

    monkeypatch.setattr("regate_patch.passes.rewrite.check", check)
    decoder, x = _With(lambda x: x), torch.randn(2, 6, 8)
    expected = decoder(x)
    handle = regate_patch.patch(decoder, backend="eager")
    with pytest.raises(UnsupportedGraphError, match=r"'check' ended in IndexError(.|\n)*test_refusals.py") as error:
        _call(decoder)
    assert isinstance(error.value.__cause__, IndexError)
    handle = regate_patch.patch(decoder, backend="eager", on_unsupported="warn")
    with regate_patch.active(torch.tensor([[0, 2], [1, 3]])):
        torch.testing.assert_close(decoder(x), expected)
    assert "IndexError" in str(handle.statistics.failed)


def test_keys_beside_those_of_positions() -> None:
    """Learned ones, laid to the others: the mask that hides the filling would be too short."""

    class Registers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.more = nn.Linear(8, 24), nn.Parameter(torch.randn(1, 2, 8))

        def forward(self, hidden_states: Tensor) -> Tensor:
            q, k, v = self.qkv(hidden_states).chunk(3, -1)
            k, v = (torch.cat([self.more.expand(len(x), -1, -1), x], 1) for x in (k, v))
            mask = F.pad(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril(), (2, 0), value=True)
            return hidden_states + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    decoder = Registers()
    regate_patch.patch(decoder, backend="eager")
    with pytest.raises(UnsupportedGraphError, match=r"keys that are no positions(.|\n)*test_refusals.py"):
        _call(decoder)


def _experts(x: Tensor) -> Tensor:
    """Each of two experts on the tokens that it finds to be its own."""
    flat = x.flatten(0, 1)
    output = torch.zeros_like(flat)
    for own, scale in ((flat[:, 0] > 0, 2.0), (flat[:, 0] <= 0, -1.0)):
        (token,) = torch.where(own)
        output = output.index_add(0, token, scale * flat[token])
    return output.view(x.shape)


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_that_the_decoder_finds_itself(rows: int) -> None:
    """In a batch of one row the list of all rows' tokens has a token axis, and what is picked from it has none."""
    decoder = _With(_experts)
    x, index = torch.randn(rows, 6, 8), torch.tensor([[0, 2, 3], [1, 3, 5]])[:rows]
    chosen = index[..., None].expand(-1, -1, 8)
    expected = decoder(x.gather(1, chosen))
    regate_patch.patch(decoder, backend="eager")
    with regate_patch.active(index):
        torch.testing.assert_close(decoder(x).gather(1, chosen), expected)


def test_fixed_length() -> None:
    decoder = _With(lambda x: x + torch.zeros(6, 8))
    regate_patch.patch(decoder, backend="eager")
    with pytest.raises(UnsupportedGraphError, match="a fixed or derived number"):
        _call(decoder)


def test_graph_break() -> None:
    decoder = Decoder("broken").double()
    regate_patch.patch(decoder, backend="eager")
    with (
        pytest.raises(UnsupportedGraphError, match=r"one graph(.|\n)*plain.py"),
        regate_patch.active(torch.tensor([[0, 2], [1, 3]])),
    ):
        decoder(torch.randn(2, 6, 16, dtype=torch.double))


def test_a_capture_that_fails_within_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("of Dynamo's")

    decoder = Decoder().double()
    regate_patch.patch(decoder, backend="eager")
    monkeypatch.setattr(torch._dynamo.variables.builder.VariableBuilder, "__call__", fail)
    with (
        pytest.raises(
            UnsupportedGraphError, match=rf"torch {torch.__version__[:4]}(.|\n)*another release(.|\n)*of Dynamo's"
        ),
        regate_patch.active(torch.tensor([[0, 2], [1, 3]])),
    ):
        decoder(torch.randn(2, 6, 16, dtype=torch.double))


def test_no_attention() -> None:
    decoder = nn.Sequential(nn.Linear(8, 8))
    regate_patch.patch(decoder, backend="eager")
    with pytest.raises(NoBlocksError, match="searched"):
        _call(decoder)


def test_keys_that_leave_the_decoder() -> None:
    model = CORE["llava"].build()
    batch = CORE["llava"].batch("none")
    regate_patch.patch(model.model.language_model, backend="eager")
    with (
        pytest.raises(UnsupportedGraphError, match="use_cache=False"),
        regate_patch.active(batch["attention_mask"].bool()),
    ):
        model(**batch, use_cache=True)


def test_warn_runs_dense_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    decoder = _With(lambda x: x.roll(1, 1))
    x = torch.randn(2, 6, 8)
    expected = decoder(x)
    handle = regate_patch.patch(decoder, backend="eager", on_unsupported="warn")
    for _ in range(2):
        with regate_patch.active(torch.tensor([[0, 2], [1, 3]])):
            torch.testing.assert_close(decoder(x), expected)
    assert handle.statistics.failed is not None
    assert "another order" in handle.statistics.failed
    assert len([r for r in caplog.records if "dense" in r.message]) == 1


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (torch.tensor([[2, 0], [1, 3]]), "ascend"),
        (torch.tensor([[1, 1], [1, 3]]), "ascend"),
        (torch.tensor([[-1, 1], [1, 3]]), "at the end"),
        (torch.tensor([[1, -1], [1, 3]]), "length"),
        (torch.tensor([1, 2]), r"\[B, K\]"),
        (torch.tensor([[0.0, 1.0]]), "integers"),
        (torch.tensor([[0, 9], [1, 3]]), "of a sequence of 10"),
        (torch.tensor([[0, 1]]), r"\[B, K\]"),
    ],
)
def test_bad_positions(index: Tensor, says: str) -> None:
    decoder = Decoder(layers=1)
    regate_patch.patch(decoder, backend="eager")
    with pytest.raises(regate_patch.ActiveIndexError, match=says), regate_patch.active(index):
        decoder(torch.randn(2, 6, 16))
