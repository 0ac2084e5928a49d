"""Lazy logits: what a model does with them is what it would do with logits, and cross-entropy takes them in chunks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regate
from regate.output.logits import LazyHead, LazyLogits
from tests import oracle
from tests.zoo import CORE

V, D = 50, 8


def _shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()(logits[..., :-1, :].contiguous().view(-1, V), labels[..., 1:].reshape(-1))


def _capped(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft-capping as Gemma 2 has it."""
    logits = torch.tanh(logits / 3.0) * 3.0
    return (
        F.cross_entropy(logits.to(torch.float64).view(-1, V), labels.view(-1), ignore_index=-100, reduction="sum") / 7
    )


def _scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit scale as Cohere has it, label smoothing as trainers do."""
    return F.cross_entropy((0.25 * logits).flatten(0, 1), labels.view(-1), label_smoothing=0.1)


def _in_place(logits: Tensor, labels: Tensor) -> Tensor:
    logits /= 2.0
    logits.mul_(0.5)
    return _shifted(logits, labels)


def _by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """Nothing here can be deferred."""
    return -F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).mean()


def _per_label(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").square().sum()


def _problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V).double()
    hidden = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (2, 7))
    labels[0, :3] = -100
    return head, hidden, labels


@pytest.mark.parametrize("chunk", [1, 3 * V, 1000 * V])
@pytest.mark.parametrize("loss", [_shifted, _capped, _scaled, _in_place, _by_hand, _per_label])
def test_same_loss_and_gradients(loss: Callable[[Tensor, Tensor], Tensor], chunk: int) -> None:
    head, hidden, labels = _problem()
    expected = loss(head(hidden), labels)
    gradients = torch.autograd.grad(expected, [hidden, *head.parameters()])
    with LazyHead(head, chunk=chunk).standing_in():
        logits = head(hidden)
        assert isinstance(logits, LazyLogits)
        assert logits.shape == (2, 7, V)
        found = loss(logits, labels)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, [hidden, *head.parameters()]), gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert "forward" not in head.__dict__


@pytest.mark.parametrize("loss", [_shifted, _capped, _scaled])
def test_cross_entropy_never_sees_more_than_a_chunk(
    loss: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, hidden, labels = _problem()
    rows: list[int] = []
    forward = type(head).forward
    monkeypatch.setattr(type(head), "forward", lambda self, x: rows.append(x[..., 0].numel()) or forward(self, x))
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel() if x.shape[-1:] == (V,) else 0)
        return x

    with LazyHead(head, chunk=3 * V).standing_in(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = loss(head(hidden), labels)
    found.backward()
    assert max(rows) == 3
    assert max(kept) < 3 * V, "logits are kept for the backward pass"


def test_what_cannot_be_deferred_is_computed() -> None:
    head, hidden, _ = _problem()
    with LazyHead(head).standing_in():
        for operation in (lambda x: x + 1, lambda x: x.argmax(-1), lambda x: x[:, 0], lambda x: x * x, torch.isnan):
            logits = head(hidden)
            assert type(operation(logits)) is Tensor
            assert torch.equal(operation(logits), operation(head.weight.new_tensor(0) + _plain(head, hidden)))
        logits = head(hidden)
        with pytest.raises(TypeError, match="not computed yet"), torch._C.DisableTorchFunctionSubclass():
            logits.relu()


def _plain(head: nn.Module, hidden: Tensor) -> Tensor:
    return F.linear(hidden, head.weight, head.bias)  # type: ignore[arg-type]


def test_losses_per_label_are_noted() -> None:
    head, hidden, labels = _problem()
    lazy = LazyHead(head)
    expected = F.cross_entropy(_plain(head, hidden).flatten(0, 1), labels.flatten(), reduction="none").float()
    with lazy.standing_in():
        F.cross_entropy(head(hidden).view(-1, V), labels.view(-1))
        assert lazy.losses is not None
        torch.testing.assert_close(lazy.losses, expected.detach())
        F.cross_entropy(head(hidden).view(-1, V), labels.view(-1))
        assert lazy.losses is None  # of two, which?
    with lazy.standing_in():
        _scaled(head(hidden), labels)  # with label smoothing they are no -log p
        assert lazy.losses is None


@pytest.mark.parametrize("autocast", [False, True])
def test_many_chunks_lose_no_gradient(autocast: bool) -> None:
    """In bfloat16, the sum of many chunks' gradients would forget most of them."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(32, V, bias=False), torch.randn(4096, 32)
    labels = torch.randint(0, V, (4096,))
    (expected,) = torch.autograd.grad(F.cross_entropy(head(hidden), labels), [head.weight])
    if not autocast:
        head, hidden = head.bfloat16(), hidden.bfloat16()
    errors = []
    for rows in (4096, 8):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), LazyHead(head).standing_in(rows=rows):
            loss = F.cross_entropy(head(hidden).float(), labels)
        (found,) = torch.autograd.grad(loss, [head.weight])
        assert found.dtype == head.weight.dtype
        errors.append(float((found.float() - expected).norm() / expected.norm()))
    assert errors[1] < 1.5 * errors[0]


class _Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return _shifted(self.head(hidden), labels)


def test_parameters_that_were_others_in_the_forward() -> None:
    """`torch.func.functional_call` puts them in for the forward alone; chunks are computed again in the backward."""
    head, hidden, labels = _problem()
    model = _Model(head)
    others = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
    found = []
    for rows in (None, 3):
        with LazyHead(head).standing_in(rows=rows):
            loss = torch.func.functional_call(model, others, (hidden, labels))
        found.append((loss, torch.autograd.grad(loss, [hidden, *others.values()])))
    torch.testing.assert_close(found[1], found[0])


def test_a_metric_without_gradients_takes_none_away() -> None:
    head, hidden, labels = _problem()
    expected = torch.autograd.grad(_shifted(head(hidden), labels), hidden)[0]
    with LazyHead(head).standing_in():
        logits = head(hidden)
        with torch.no_grad():
            assert (logits.argmax(-1) == labels).shape == (2, 7)
        found = torch.autograd.grad(_shifted(logits, labels), hidden)[0]
    torch.testing.assert_close(found, expected)


def test_logits_computed_late_are_those_of_then() -> None:
    """Outside the autocast under which the head was called."""
    head, hidden, _ = _problem()
    head, hidden = head.float(), hidden.detach().float()
    with LazyHead(head).standing_in(), torch.autocast("cpu", torch.bfloat16):
        logits, expected = head(hidden), F.linear(hidden, head.weight, head.bias)  # type: ignore[arg-type]
    assert torch.equal(logits + 0, expected)


def test_copies_have_a_head_of_their_own() -> None:
    head, hidden, _ = _problem()
    with LazyHead(head).standing_in():
        copied, pickled = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    for other in (copied, pickled):
        other.weight.data.zero_()
        assert torch.equal(other(hidden), other.bias.expand(2, 7, V))
    assert head.weight.any()


def test_autocast() -> None:
    head, hidden, labels = _problem()
    head, hidden = head.float(), hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = _shifted(head(hidden).float(), labels)
        with LazyHead(head, chunk=3 * V).standing_in():
            logits = head(hidden)
            assert logits.dtype == torch.bfloat16
            found = _shifted(logits.float(), labels)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, hidden)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-4)


class _Twice(torch.autograd.Function):
    """A kernel of one's own, which Python does not see into."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return torch.from_numpy(logits.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def test_a_loss_that_passes_python_by_gets_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient would be lost on the way: the first batch shows it, and logits are computed at once."""
    model = CORE["llava"].build()

    def loss(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(_Twice.apply(logits).flatten(0, 1), shifted.flatten())

    monkeypatch.setattr(type(model), "loss_function", property(lambda self: loss))
    batch = CORE["llava"].batch("right")
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    gate = regate.apply(model, regate.Config(warmup=1000), teacher=None)
    model(**batch).loss.backward()
    assert "computed all at once" in str(gate.report())
    for n, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[n].grad, gradient, atol=1e-5, rtol=1e-4)


def test_a_gated_step_computes_logits_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `apply`: the numbers of `logits="all"`, and never more logits than a chunk."""
    found = []
    for logits in ("kept", "all"):
        model = CORE["llava"].build().double()
        batch = oracle.double(CORE["llava"].batch("right"))
        gate = regate.apply(model, regate.Config(warmup=1000, logits=logits), teacher=None)  # type: ignore[arg-type]
        model(**batch)
        if gate._parts._lazy is not None:
            gate._parts._lazy.chunk = 3 * 100
            model(**batch)  # the loss comes about otherwise than in one chunk, and is proven once more
        rows: list[int] = []
        forward = nn.Linear.forward

        def noting(
            self: nn.Linear, x: Tensor, forward: Any = forward, head: Any = model.lm_head, rows: Any = rows
        ) -> Tensor:
            if self is head:
                rows.append(x[..., 0].numel())
            return forward(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", noting)
            output = model(**batch)
            output.loss.backward()
        found.append((output.loss, [p.grad for p in model.parameters() if p.grad is not None]))
        assert (max(rows) <= 3) == (logits == "kept")
        assert "all at once" not in str(gate.report())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", None])
def test_gradients_of_gradients(frozen: str | None) -> None:
    """As a penalty on them takes: those of chunks depend on hidden states and parameters, too."""
    head, hidden, labels = _problem()
    head.weight.requires_grad_(frozen != "weight")
    hidden.requires_grad_(frozen != "hidden")
    learning = [x for x in (hidden, *head.parameters()) if x.requires_grad]
    found = []
    for rows in (None, 3):
        with LazyHead(head).standing_in(rows=rows):
            loss = _capped(head(hidden), labels)
        gradients = torch.autograd.grad(loss, learning, create_graph=True)
        penalty = sum((x.square().sum() for x in gradients), torch.zeros(()))
        found.append((gradients, torch.autograd.grad(penalty, learning)))
    torch.testing.assert_close(found[1], found[0])


def test_gradients_of_gradients_of_tied_weights() -> None:
    """Hidden states are made of the head's own weight: the way through them is autograd's, and is gone once."""
    head, hidden, labels = _problem()
    found = []
    for rows in (None, 3):
        with LazyHead(head).standing_in(rows=rows):
            loss = _capped(head((hidden @ head.weight.T @ head.weight).tanh()), labels)
        (gradient,) = torch.autograd.grad(loss, head.weight, create_graph=True)
        found.append((gradient, torch.autograd.grad(gradient.square().sum(), head.weight)))
    torch.testing.assert_close(found[1], found[0])
