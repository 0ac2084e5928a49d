"""`regate.apply` and `regate.remove`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Never, get_args

from torch import nn

import regate_patch
from model_adapters import ModelAdapter, find_adapter
from model_adapters.conventional import unwrap
from regate.attached import gate_on
from regate.config import Config
from regate.errors import ConfigError, GateNotAppliedError, UnknownArchitectureError, served
from regate.gate import Gate
from regate.memory.store import Store
from regate.teaching.choice import TeacherChoice
from regate.training.hooks import through_peft


def apply(
    model: nn.Module,
    config: Config | None = None,
    *,
    adapter: ModelAdapter | None = None,
    backend: regate_patch.Backend | None = "auto",
    teacher: TeacherChoice = "auto",
    store: Store | str | None = None,
    on_unsupported: regate_patch.OnUnsupported = "raise",
    **others: Never,
) -> Gate:
    """Train `model` on fewer tokens: one line, then train exactly as before.

    Weights, state dict and architecture stay as they are; `regate.remove(model)` undoes it. Applying again
    replaces the first gate, which is gone even where this raises.

    Args:
        model: a multimodal causal language model, plain or wrapped by PEFT or DDP.
        config: see `Config`.
        adapter: how to serve the architecture; None finds it (`register_adapter`, plug-ins, conventions).
        backend: how rewritten graphs run; "auto", or None, is "inductor" on CUDA and "eager" elsewhere.
        teacher: "copy" keeps a frozen copy of the language model, "4bit" quantises it (bitsandbytes). "first" keeps
            none: the model itself gives the reference losses of the whole training set, before its first optimizer
            step; a Hugging Face Trainer does so when training begins, a loop of your own calls `gate.precompute`.
            "precomputed" is the same with losses that are in the store when training begins. "auto" is "copy", or
            "first" where FSDP2 has split the model, or will and ranks lack its weights yet, or the GPU has no room for
            a copy. With PEFT the frozen base model is the teacher at any time, unless a copy is asked for. A module is
            a language model, or a multimodal one whose language model is the teacher, with the tokenizer of `model`,
            and computes where it is; any other text is the path or hub id of such a model, which is loaded on every
            rank and goes where `model` goes. A small one costs a fraction of a copy's passes. With another tokenizer
            it is a `CrossTokenizerTeacher`. None scores by difficulty alone.
        store: where reference losses and difficulties are kept: a directory, a `Store`, or None for a temporary
            one. Later runs with the same teacher find the losses there; runs at the same time need one each
            (`Store.copy_references`).
        on_unsupported: "raise", or "warn" to train dense where the decoder cannot be rewritten.
        others: none; settings come in `config`, and an error says so.

    Raises:
        UnknownArchitectureError: no adapter serves the model, or PEFT adapts it by a method that cannot be followed.
        UnsupportedShardingError: teacher="copy" or "4bit" for a model that FSDP2 or DeepSpeed ZeRO-3 has split, or
            whose weights ranks lack.
        StoreMismatchError: the store's reference losses were made by another teacher.
        StoreError: the store cannot be opened at that path, or it is none.
        ConfigError: a setting out of range, or that does not exist; a decoder that cannot be copied for a teacher; or
            nothing that can be loaded as one.
        UnknownBackendError: torch knows no backend of that name.
    """
    _refuse_others(others)
    _refuse_by_kind(model, config, adapter, on_unsupported)
    with served():
        adapter = find_adapter(model) if adapter is None else adapter
        target = adapter.causal_lm(model)
        adapter.decoder(model)
        adapter.head(model)
    _refuse_by_method(model)
    if (existing := gate_on(target)) is not None:
        existing.remove()  # first of all, for its teacher may fill the memory that the next one needs
    through_peft(model)
    gate = Gate(
        model,
        config or Config(),
        adapter=adapter,
        backend="auto" if backend is None else backend,
        teacher=teacher,
        store=store if isinstance(store, Store) else Store(store),
        on_unsupported=on_unsupported,
    )
    if existing is not None:
        gate.replaces(existing)
    return gate


def remove(model: nn.Module) -> None:
    """Undo `apply`.

    Raises:
        GateNotAppliedError: no gate is on this model.
    """
    gate = gate_of(model) if isinstance(model, nn.Module) else None
    if gate is None:
        raise GateNotAppliedError(f"no gate is applied to this {type(model).__name__}")
    gate.remove()


def gate_of(model: nn.Module) -> Gate | None:
    """The gate on a model or inside what wraps it, or None."""
    return next((gate for m in [unwrap(model), *model.modules()] if (gate := gate_on(m)) is not None), None)


def _refuse_others(others: Mapping[str, object]) -> None:
    """Settings that belong into the config, and names that are none."""
    known = {field.name for field in fields(Config)}
    if settings := {name: value for name, value in others.items() if name in known}:
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ConfigError(f"settings come as one argument: regate.apply(model, regate.Config({told}))")
    if others:
        raise ConfigError(f"regate.apply has no argument named {', '.join(map(repr, others))}; see help(regate.apply)")


def _refuse_by_kind(model: Any, config: Any, adapter: Any, on_unsupported: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UnknownArchitectureError(
            f"regate.apply takes the model that is trained, a torch.nn.Module, got {type(model).__name__}; a trainer's "
            "is trainer.model"
        )
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"settings come as regate.Config(keep=..., ...), got {type(config).__name__} {config!r}")
    if adapter is not None and not isinstance(adapter, ModelAdapter):
        raise ConfigError(
            f"adapter must be a regate.ModelAdapter, or None, by which the model's is found, got {adapter!r}; "
            "regate.register_adapter makes one be found"
        )
    if on_unsupported not in get_args(regate_patch.OnUnsupported):
        raise ConfigError(
            f"on_unsupported must be one of {get_args(regate_patch.OnUnsupported)}, got {on_unsupported!r}"
        )


def _refuse_by_method(model: nn.Module) -> None:
    """Methods of PEFT that the engine cannot follow.

    Prompt tuning and its kin call the model with embeddings that no ids stand for, or with keys out of nowhere; LoHa
    and LoKr draw a number in each layer to decide whether it takes part.
    """
    configs = [config for part in model.modules() for config in (getattr(part, "peft_config", None) or {}).values()]
    for config in configs:
        name = type(config).__name__
        if getattr(config, "is_prompt_learning", False):
            raise UnknownArchitectureError(
                f"{name} puts virtual tokens in front of the text: keys that are no position of the sequence, or "
                "embeddings without ids, by which samples could not be told apart. Train it without a gate, or adapt "
                "weights instead: LoRA, DoRA, IA3 and the like are exact"
            )
        if name in ("LoHaConfig", "LoKrConfig"):
            raise UnknownArchitectureError(
                f"{name}'s layers draw a random number in each training forward to decide whether they take part, and "
                "that cannot be captured in a graph. Train it without a gate, or with LoRA, DoRA, VeRA, IA3 or OFT"
            )
