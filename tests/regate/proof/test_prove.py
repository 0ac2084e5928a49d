"""Models of unusual kinds on the first batch: what they return, and what their forwards write."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

import regate
from regate import asking
from regate.errors import LabelsError
from regate.forward import Forward
from regate.proof import trial
from regate.proof.prove import NOTHING
from regate.proof.trial import Run
from regate_patch import reference
from regate_patch.context import current
from tests import oracle
from tests.steps import assert_same, step
from tests.zoo import CORE

FULL = regate.Config(warmup=1000)
SPARSE = regate.Config(warmup=0, cycle=1, full_steps=0)
Loss = Callable[[Any], Tensor]


def _made(returned: Callable[[Any], Any] = lambda output: output) -> tuple[Any, dict[str, Any]]:
    """A model whose forward, which cannot be told to make no cache, gives what `returned` makes of its output."""
    torch._dynamo.reset()
    model = CORE["llava"].build().double()
    usual = type(model)

    class Own(usual):  # type: ignore[valid-type, misc]
        def forward(
            self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor, labels: Tensor | None = None
        ) -> Any:
            call = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
            return returned(usual.forward(self, **call, labels=labels))

    model.__class__ = Own
    return model, oracle.double(CORE["llava"].batch("right"))


def test_a_head_that_begins_at_zero_is_seen_to_read_what_it_reads() -> None:
    """Its own gradient tells, and nothing else does before its first step."""
    model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("none"))
    model.aux = nn.Linear(model.lm_head.in_features, 3).double()
    nn.init.zeros_(model.aux.weight)
    own = type(model).forward

    @functools.wraps(own)
    def forward(**call: Any) -> Any:
        labels = call.pop("labels")
        hidden = model.model(**call).last_hidden_state
        loss = model.loss_function(model.lm_head(hidden), labels, vocab_size=model.lm_head.out_features)
        kinds = torch.arange(len(hidden)) % 3
        return CausalLMOutput(loss=loss + F.cross_entropy(model.aux(hidden.mean(1)), kinds))

    model.forward = forward
    start = copy.deepcopy(model.state_dict())
    found = []
    for gated in (False, True):
        model.load_state_dict(start)
        if gated:
            regate.apply(model, FULL, teacher=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            found.append(step(model, batch))
            optimizer.step()
    assert_same(found[2], found[0])
    assert_same(found[3], found[1])


@pytest.mark.parametrize(
    ("returned", "loss"),
    [
        pytest.param(lambda output: output.loss, lambda loss: loss, id="the loss alone"),
        pytest.param(lambda output: output.to_tuple(), lambda output: output[0], id="return_dict=False"),
        pytest.param(lambda o: (o.logits, o.loss), lambda output: output[1], id="logits first"),
    ],
)
def test_outputs_without_names(returned: Callable[[Any], Any], loss: Loss) -> None:
    model, batch = _made(returned)
    dense = step(model, batch, loss)
    regate.apply(model, FULL, teacher=None)
    assert_same(step(model, batch, loss), dense)
    gate = regate.apply(model, SPARSE, teacher=None)
    got, last = step(model, batch, loss), gate.last
    assert last is not None
    assert "note" not in str(gate.report())
    regate.remove(model)
    with reference.masked(model.model.language_model.layers, last.active):
        assert_same(got, step(model, batch | {"labels": last.labels_left}, loss))


@pytest.mark.parametrize("per_sample", [False, True])
def test_losses_that_callers_reduce(per_sample: bool) -> None:
    """One per position or per sample: who reduces them counts on their shape."""
    model, batch = _made()

    def unreduced(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return losses.view(len(labels), -1).mean(1) if per_sample else losses

    model.loss_function = unreduced
    dense = step(model, batch, lambda output: output.loss.mean())
    gate = regate.apply(model, FULL, teacher=None)
    assert_same(step(model, batch, lambda output: output.loss.mean()), dense)
    assert "the vocabulary projection runs at every position" in str(gate.report())


def test_smoothed_labels() -> None:
    """Their loss is multiplied by numbers, which are no tensors."""
    model, batch = _made()

    def smoothed(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)

    model.loss_function = smoothed
    dense = step(model, batch)
    gate = regate.apply(model, FULL, teacher=None)
    assert_same(step(model, batch), dense)
    assert "note" not in str(gate.report())


def test_labels_that_are_shifted_already_are_found_out() -> None:
    """Where the model's loss does not shift them: a label is predicted where it stands."""
    model, batch = _made()

    def unshifted(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    model.loss_function = unshifted
    batch["labels"] = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    regate.apply(model, SPARSE, teacher=None)
    with pytest.raises(LabelsError, match="the batch brings them shifted by one already"):
        model(**batch)


def test_a_forward_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what the gate does after it: another model's decoder must not run on this one's positions."""
    model, batch = _made()
    regate.apply(model, SPARSE, teacher=None)
    with monkeypatch.context() as patched:
        patched.setattr(Forward, "outgrown", lambda self, output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
    assert current() is None


def test_exact_mode_computes_what_is_read() -> None:
    """Also where that is padding: no step of it is sparse."""
    model, batch = _made()

    def with_last(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        own = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return own + logits[:, -1].pow(2).mean()

    model.loss_function = with_last
    dense = step(model, batch)
    gate = regate.apply(model, regate.Config.exact(warmup=0))
    for _ in range(2):
        assert_same(step(model, batch), dense)
    assert gate.report()["steps_sparse"] == 0


def _batch_norm(projector: Any) -> nn.Module:
    return nn.Sequential(projector, _OverFeatures(nn.BatchNorm1d(32).double()))


class _OverFeatures(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view(x.shape)  # type: ignore[no-any-return]


def _spectral_norm(projector: Any) -> nn.Module:
    torch.manual_seed(1)
    nn.utils.parametrizations.spectral_norm(projector.linear_1)
    return projector  # type: ignore[no-any-return]


@pytest.mark.parametrize("with_buffers", [_batch_norm, _spectral_norm])
def test_the_proof_leaves_buffers_as_they_were(with_buffers: Callable[[Any], nn.Module]) -> None:
    """A batch is counted once in running statistics, and its random numbers are drawn once."""
    states = []
    for gated in (False, True):
        model, batch = _made()
        model.model.multi_modal_projector = with_buffers(model.model.multi_modal_projector)
        gate = regate.apply(model, FULL, teacher=None) if gated else None
        torch.manual_seed(7)
        for _ in range(2):
            model(**batch)
        states.append({name: buffer.clone() for name, buffer in model.named_buffers()} | {"next": torch.rand(1)})
        assert gate is None or "note" not in str(gate.report())
    dense, gated_state = states
    for name, value in dense.items():
        torch.testing.assert_close(gated_state[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_that_begins_inside_the_models_forward(dtype: torch.dtype) -> None:
    """As accelerate has it: what is compared has its digits, not those of the weights."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    own = model.forward

    @functools.wraps(own)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return own(*args, **kwargs)

    model.forward = narrow
    seen: list[Run] = []
    tolerance = trial.tolerance
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trial, "tolerance", lambda run: seen.append(run) or tolerance(run))
        gate = regate.apply(model, regate.Config(warmup=1000), teacher=None)
        model(**batch)
    assert {run.eps for run in seen} == {torch.finfo(dtype).eps}
    assert "vocabulary projection" not in str(gate.report())


def test_a_forward_of_ones_own_is_what_is_proven() -> None:
    """Dropout puts the engine's graphs aside for the proof; the decoder's own forward stays."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    decoder = model.model.language_model
    decoder.layers[0].self_attn.attention_dropout = 0.1
    calls: list[int] = []

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    decoder.forward = types.MethodType(own, decoder)
    standing = decoder.forward
    regate.apply(model, regate.Config(warmup=1000), teacher=None)
    model(**batch)
    assert len(calls) > 1
    regate.remove(model)
    assert decoder.forward is standing


def test_what_stands_in_front_of_the_gates_forward_stays() -> None:
    """With dropout, too, for which the proof captures the decoder aside."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("right")
    decoder = model.model.language_model
    decoder.layers[0].self_attn.attention_dropout = 0.1
    gate = regate.apply(model, SPARSE, teacher=None)
    gated, calls = decoder.forward, []

    def in_front(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return gated(*args, **kwargs)

    decoder.forward = in_front
    for _ in range(2):
        model(**batch).loss.backward()
    assert decoder.forward is in_front
    assert gate.report()["positions_computed"] < gate.report()["positions_seen"]
    assert gate.report()["recompiles"] == 0


def test_losses_are_those_of_the_forward_where_logits_were_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the proof left behind, though it be as many."""
    model, batch = CORE["llava"].build(), CORE["llava"].batch("none", rows=1)

    def by_a_kernel_of_ones_own(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        if type(logits) is not Tensor:
            raise TypeError("takes plain tensors alone")
        return loss

    model.loss_function = by_a_kernel_of_ones_own
    gate = regate.apply(model, SPARSE, teacher=None)
    learnt: list[Tensor] = []
    monkeypatch.setattr(gate.scorer, "observe", lambda samples, kept, losses, **others: learnt.append(losses))
    loss = model(**batch).loss
    torch.testing.assert_close(learnt[0].mean(), loss.detach())
    assert gate._parts.readers.proven is not None
    assert not gate._parts.readers.proven.lazy


def test_an_engine_that_computes_something_else_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "prove", lambda subject: replace(NOTHING, other=True))
    model = CORE["llava"].build()
    gate = regate.apply(model, FULL, teacher=None)
    model(**CORE["llava"].batch())
    assert "sparse steps may be off" in str(gate.report())


def test_the_proof_leaves_numbers_as_they_were() -> None:
    """Such as a count of calls, by which a loss is warmed up."""
    losses = []
    for gated in (False, True):
        model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right"))
        own, model.calls = model.loss_function, 0

        def loss(model: Any = model, own: Any = own, **inputs: Any) -> Tensor:
            model.calls += 1
            return own(**inputs) * min(model.calls / 4, 1.0)

        model.loss_function = loss
        if gated:
            regate.apply(model, FULL, teacher=None)
        losses.append([model(**batch).loss.detach() for _ in range(5)])
    torch.testing.assert_close(losses[1], losses[0], atol=2e-6, rtol=0)


def test_a_loss_that_changes_by_itself_is_not_taken_for_the_engines_fault() -> None:
    model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right"))
    own, calls = model.loss_function, iter(range(1000))
    model.loss_function = lambda **inputs: own(**inputs) * next(calls)
    gate = regate.apply(model, FULL, teacher=None)
    model(**batch)
    assert "changes from one call to the next" in str(gate.report())
    assert "report the model" not in str(gate.report())


def test_a_head_in_a_reentrant_checkpoint() -> None:
    results = []
    for gated in (False, True):
        torch._dynamo.reset()
        model, batch = CORE["llava"].build().double(), oracle.double(CORE["llava"].batch("right"))
        own = model.lm_head.forward
        model.lm_head.forward = functools.partial(checkpoint, own, use_reentrant=True)
        gate = regate.apply(model, FULL, teacher=None) if gated else None
        results.append(step(model, batch))
    assert gate is not None
    assert "use_reentrant=True" in str(gate.report())
    assert_same(results[1], results[0])
