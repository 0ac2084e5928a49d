"""What a model's output says of its losses, in each of the forms that trainers ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from regate.errors import LogitsError
from regate.output.loss import Places, label_losses
from regate_patch import to_device

_RANKS = {"loss": 0, "logits": 3}  # [] and [B, S, V]
# TRL's fused head (trl.trainer.utils.FusedCausalLMOutput): sums of these over labels become its loss and its metrics.
_PER_LABEL = ("log_probs", "entropy", "is_top1")


def get(output: Any, name: str) -> Any:
    """An entry of a model's output, None where it has none.

    Outputs without names, as with `return_dict=False` or of a model that returns its loss alone, are told by their
    ranks: the loss is the number among them, logits [B, S, V] are the first of rank 3.
    """
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, Tensor) or type(output) in (tuple, list):
        entries = [output] if isinstance(output, Tensor) else output
        rank = _RANKS.get(name)
        return next((x for x in entries if isinstance(x, Tensor) and x.dim() == rank), None)
    return getattr(output, name, None)


def loss_of(output: Any) -> Tensor | None:
    """The loss that a model returns, or, of a head that returns log-probabilities alone (TRL's), their mean."""
    loss, log_probs, mask = get(output, "loss"), get(output, "log_probs"), get(output, "label_mask")
    if loss is None and log_probs is not None and mask is not None:
        loss = -(log_probs * mask).sum() / mask.sum()
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def kept_losses(
    output: Any, kept: Places, *, known: Tensor | None, hidden_states: Tensor | None, head: nn.Module
) -> Tensor:
    """`-log p(label)` of kept labels, [N] float32 on the model's device.

    From what there is: losses `known` from the model's own cross-entropy, [B*S] or [B*(S-1)], 0 where there is no
    label; `logits` [B, S, V]; `log_probs` [B, S-1] of TRL's fused head; or, where a fused loss leaves neither (Liger),
    the decoder's `hidden_states` [B, S, D] through `head`.

    Raises:
        LogitsError: none of them fits labels [B, S].
    """
    logits, log_probs = get(output, "logits"), get(output, "log_probs")
    rows, length = kept.shape
    if known is not None and len(known) in (rows * length, rows * (length - 1)):
        places = kept.to(known.device)
        return rearrange(known, "(row position) -> row position", row=rows)[places.row, places.column - 1]
    if logits is not None and logits.shape[:2] == kept.shape:
        return label_losses(logits.detach(), kept)
    if log_probs is not None and log_probs.shape == (rows, length - 1):
        places = kept.to(log_probs.device)
        return -log_probs.detach()[places.row, places.column - 1].float()
    if logits is None and hidden_states is not None and hidden_states.shape[:2] == kept.shape:
        return label_losses(hidden_states.detach(), kept, head=head)
    got = {name: list(x.shape) for name, x in (("logits", logits), ("log_probs", log_probs)) if x is not None}
    raise LogitsError(
        f"difficulties need the model's logits [B, S, V] = [{rows}, {length}, V]; its output has {got or 'none'}. "
        "Return logits at every position of the decoder, or none: then they are made of its hidden states, by the "
        "adapter's head"
    )


def rescale(output: Any, candidates: Tensor, share: float) -> Any:
    """TRL sums `log_probs` itself and divides by its own count of all labels: let the sums stand for all labels.

    Per-label values of kept labels [B, S-1] are divided by the `share` of labels that is kept, and `label_mask` says
    again which labels the batch had (`candidates`); then every mean that is taken of them is a mean over kept labels.
    Other outputs stay as they are.
    """
    if get(output, "log_probs") is None or get(output, "label_mask") is None:
        return output
    for name in _PER_LABEL:
        if (values := get(output, name)) is not None:
            setattr(output, name, values / share)
    output.label_mask = to_device(candidates[:, 1:], get(output, "log_probs").device)
    return output


def with_logits(output: Any, change: Callable[[Tensor], Tensor], *, shape: tuple[int, int, int]) -> Any:
    """The output with other logits in place of those it has, of this shape [B, S, V], wherever it has some.

    Outputs within outputs have logits, too (BLIP-2's `language_model_outputs`); where they have no name of their own,
    or another one, the shape tells them.
    """
    entries, made = _entries(output)
    changed = {
        name: change(entry)
        if _are_logits(name, entry, shape)
        else with_logits(entry, change, shape=shape)
        if isinstance(entry, dict | tuple)
        else entry
        for name, entry in entries.items()
    }
    same = all(changed[name] is entry for name, entry in entries.items())
    return output if same else made(changed)


def hands_out(output: Any, values: Tensor) -> bool:
    """Does a model return these values, or a view of them, under whatever name?"""
    if type(values) is not Tensor:
        return False
    waiting = [output] if isinstance(output, Tensor) else [*_entries(output)[0].values()]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict | tuple | list):
            waiting.extend(_entries(entry)[0].values())
        elif type(entry) is Tensor and entry.device == values.device:
            if entry.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
                return True
    return False


def _entries(output: Any) -> tuple[dict[Any, Any], Callable[[dict[Any, Any]], Any]]:
    """What an output holds, by name or by place, and how an output like it is made of others; nothing of other kinds.

    Objects of one's own are changed where they are.
    """
    if isinstance(output, dict):
        return dict(output), lambda changed: _like(output, changed)
    if isinstance(output, tuple) and (names := getattr(output, "_fields", None)) is not None:
        return dict(zip(names, output, strict=True)), lambda changed: type(output)(**changed)
    if type(output) in (tuple, list):
        return dict(enumerate(output)), lambda changed: type(output)(changed.values())
    if isinstance(output, Tensor):
        return {}, lambda changed: output
    names = [*getattr(output, "__dict__", ()), *getattr(type(output), "__slots__", ())]
    return {name: getattr(output, name) for name in names}, lambda changed: _set(output, changed)


def _like(output: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    return type(output)(**changed) if all(isinstance(name, str) for name in changed) else type(output)(changed)


def _set(output: Any, changed: dict[Any, Any]) -> Any:
    for name, entry in changed.items():
        object.__setattr__(output, name, entry)  # of a frozen dataclass, too
    return output


def _are_logits(name: Any, entry: Any, shape: tuple[int, int, int]) -> bool:
    """Is it a tensor [B, S, V], or [B, S, ...] of that name?"""
    if not isinstance(entry, Tensor) or entry.dim() != 3 or entry.shape[:2] != shape[:2]:
        return False
    return name == "logits" or entry.shape[2] == shape[2]
