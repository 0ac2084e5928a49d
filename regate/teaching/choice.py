"""Which teacher a user asks for."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, modeling_utils

import regate_patch
from model_adapters import ModelAdapter, find_adapter
from model_adapters.conventional import language_model, text_config, unwrap
from model_adapters.replaced import replaced
from regate.config import Config
from regate.errors import ConfigError, served
from regate.teaching.teacher import Source, Teacher
from regate.teaching.translated import CrossTokenizerTeacher, Translated
from regate.teaching.weights import is_tight, lacks_weights, uses_peft
from regate.undisturbed import random_numbers_kept
from regate_patch import is_sharded

Named = Literal["auto", "copy", "4bit", "first", "precomputed"]
_CHOICES = f"teacher must be one of {get_args(Named)}, a model, the path or hub id of one, or None"
TeacherChoice = Named | str | nn.Module | CrossTokenizerTeacher | None


def teacher_of(
    model: nn.Module,
    adapter: ModelAdapter,
    config: Config,
    choice: TeacherChoice,
    *,
    backend: regate_patch.Backend,
    on_unsupported: regate_patch.OnUnsupported,
) -> Teacher | None:
    """The teacher that a user asked for (see `regate.apply`); None where no score needs one.

    Raises:
        ConfigError: it is none of those that can be asked for.
        UnknownArchitectureError: no adapter serves the model that was given.
    """
    if not (choice is None or isinstance(choice, str | nn.Module | CrossTokenizerTeacher)):
        raise ConfigError(f"{_CHOICES}, got {choice!r}")
    if choice is None or not config.uses_references:
        return None
    named = choice if isinstance(choice, str) and choice not in get_args(Named) else None
    if named is not None:
        choice = _loaded(named)
    given = choice.model if isinstance(choice, CrossTokenizerTeacher) else choice
    if isinstance(given, nn.Module):
        _refuse_shared(given, model)
    waits = lacks_weights(given if isinstance(given, nn.Module) else model)
    taught_by, of_teacher = model, adapter
    source: Source = "copy"
    if isinstance(given, nn.Module):
        with served("this is no teacher: "):
            of_teacher = find_adapter(given)
        if isinstance(choice, CrossTokenizerTeacher) and not choice.agree:
            ends = ends_of(model)
            return Translated(choice, of_teacher, ends, backend=backend, waits=waits, on_unsupported=on_unsupported)
        taught_by, source = given, "given" if named is None else "named"
    elif given == "4bit" and not uses_peft(model, adapter):
        source = "4bit"
    elif (
        given in ("first", "precomputed")
        or (given != "copy" and uses_peft(model, adapter))
        or (given == "auto" and (waits or is_sharded(model) or is_tight(model, adapter)))
    ):
        source = "live"
    return Teacher(
        taught_by, of_teacher, backend=backend, source=source, follows=lambda: adapter.embeddings(model), waits=waits,
        on_unsupported=on_unsupported,
    )  # fmt: skip


def _loaded(name: str) -> nn.Module:
    """The model at a path or of a hub id, whole on every rank, whatever the trained one will be split by.

    Raises:
        ConfigError: transformers loads none.
    """
    whole: Any = {"is_fsdp_enabled": lambda: False, "is_deepspeed_zero3_enabled": lambda: False}
    try:
        config = AutoConfig.from_pretrained(name)
        sees = type(config) in AutoModelForImageTextToText._model_mapping
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        with random_numbers_kept(), replaced(modeling_utils, **whole):
            model: nn.Module = kind.from_pretrained(name, dtype="auto")
    except Exception as error:  # of any type: transformers has many
        told = " ".join(str(error).split())
        raise ConfigError(
            f"{_CHOICES}, got {name!r}, from which transformers loads no model: {type(error).__name__}: {told}"
        ) from error
    return model


def _refuse_shared(teacher: nn.Module, model: nn.Module) -> None:
    """A given teacher is frozen, which what learns must not be."""
    own = {id(p) for p in model.parameters() if p.requires_grad}
    layers = {id(part) for part in model.modules() if isinstance(part, nn.ModuleList)}  # which are patched, if shared
    if any(id(p) in own for p in teacher.parameters()) or any(id(part) in layers for part in teacher.modules()):
        raise ConfigError(
            f"the teacher, a {type(teacher).__name__}, has modules of the model that is trained, and would be frozen "
            "with them. Leave teacher out: the model's own language model teaches then, as it was before, as a "
            "copy or, under PEFT, the frozen base; or give another model, such as a copy.deepcopy"
        )


def ends_of(model: nn.Module) -> set[int]:
    """Ids by which the model ends a text or a turn."""
    inner = (unwrap(model), language_model(model))
    configs = [text_config(model), *(getattr(m, "generation_config", None) for m in inner)]
    found = [getattr(config, "eos_token_id", None) for config in configs]
    return {i for ids in found for i in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(i, int)}
