"""The gate in Hugging Face's `Trainer` and those made from it (TRL): numbers in its log, state in its checkpoints, and
reference losses before the first step where the model itself is the teacher.

`import regate` adds the callback to those that every trainer made later has by default; it does nothing for a model
without a gate. A trainer made before that needs `trainer.add_callback(regate.GateCallback())`.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_callback import ExportableState

from model_adapters.conventional import unwrap
from regate.api import gate_of
from regate.errors import CheckpointError, ConfigError
from regate.gate import Gate
from regate.memory import checkpoint
from regate.ranks import any_rank
from regate.scoring.ahead import has_length, own_part
from regate.undisturbed import random_numbers_kept
from regate_patch import is_sharded

log = logging.getLogger("regate")


AGAIN = (
    "this training begins at step 0, and the gate's schedule goes on at step {step}, where the last one ended: without "
    "another warm-up. Set gate.step = 0 before trainer.train() to begin it anew"
)
ANOTHER = (
    "a gate is on another %s than the one that is trained now, which is trained dense. With model_init a Trainer makes "
    "its model anew in train(): call regate.apply in model_init"
)


class GateCallback(TrainerCallback, ExportableState):
    """Logs `regate/...` numbers, saves the gate with each checkpoint, and loads it when training resumes."""

    gated = False  # is the run?

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}  # the report at the last log

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **others: Any,
    ) -> None:
        """Checks that the run can be gated, loads the gate's state where it is resumed, and else, where the model is
        its own teacher, computes reference losses of the training set.

        Raises:
            ConfigError: a trainer that trains on no labels, or weighs them by their sum; a training set that cannot be
                gone through before the first step, and a teacher that needs it.
            CheckpointError: a gated run is resumed whose gate state cannot be found.
            StoreError: it is resumed without the reference losses that it had, or with those of another teacher, or a
                run of another process learns into its store.
        """
        gate = _gate(model)
        self.gated = gate is not None
        if gate is None:
            _warn_of_another(model)
            return
        kind = _of_trl(args)
        if kind not in (None, "SFTConfig"):
            raise ConfigError(
                f"a trainer with {kind} trains on preferences or rewards, and its model gets no labels: there are no "
                "answer tokens to choose from. Train it without a gate (regate.remove(model)), or on labels with "
                "SFTTrainer"
            )
        loss_type = getattr(args, "loss_type", None) or "nll"  # SFTConfig's; ms-swift has it, and leaves it None
        if loss_type != "nll" and gate.config.keep < 1:
            raise ConfigError(
                f"loss_type={loss_type!r} weighs labels by what is summed over them, and sparse steps rescale "
                "that sum; use loss_type='nll', or regate.Config(keep=1.0)"
            )
        if state.global_step > 0 and not (gate.just_loaded or gate.was_set_to(state.global_step)):
            _resume(gate, args, state)
        elif state.global_step == 0:
            if gate.made and not gate.was_set_to(gate.made):
                gate.note(AGAIN.format(step=gate.made))
            # Ranks with more room on their device keep a copy; teaching first is for all of them or none.
            if (is_sharded(gate.model) or any_rank(gate.first)) and has_length(train_dataloader):
                gate.teach_first()
            if gate.first:
                _teach(gate, args, train_dataloader)
        _see_that_a_step_is_sparse(gate, state)
        _see_how_it_ends(gate, state)
        self._before = dict(gate.report())

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        if (gate := _gate(model)) is None:
            return
        if state.is_hyper_param_search:
            gate.note("in a search for hyperparameters the gate's state is not saved beside the trials' checkpoints")
            return
        gate.save(_folder(args, state), on_each_node=args.save_on_each_node)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        if (gate := _gate(model)) is not None:
            gate.scorer.recurrence.epoch_ended()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """Shares since the last log; trackers read `logs` after this callback, and the history is kept already."""
        gate = _gate(model)
        if gate is None or logs is None or "loss" not in logs:
            return
        now, before = dict(gate.report()), self._before
        self._before = now
        new = {name: now[name] - before.get(name, 0) for name in now}
        if not new["positions_seen"]:
            return
        numbers = {
            "regate/active_tokens": new["positions_computed"] / new["positions_seen"],
            "regate/kept_labels": new["labels_kept"] / max(new["labels_seen"], 1),
            "regate/speedup_estimate": new["flops_dense"] / max(new["flops_computed"], 1.0),
        }
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def state(self) -> dict[str, Any]:
        """Says in `trainer_state.json` that the run was gated; the state itself is in its own file."""
        return {"args": {}, "attributes": {"gated": self.gated}}


def _warn_of_another(model: nn.Module | None) -> None:
    """Is there a gate that waits for its first forward, on another model of this class?"""
    kind = type(unwrap(model))
    if any(type(unwrap(gate.model)) is kind for gate in Gate.waiting()):
        log.warning(ANOTHER, kind.__name__)


def _resume(gate: Gate, args: TrainingArguments, state: TrainerState) -> None:
    folders = [_folder(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.append(Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / checkpoint.NAME).exists():
            gate.load(folder)
            return
    if _was_gated(state):
        whole = max(Path(args.output_dir or "").glob(f"checkpoint-*/{checkpoint.NAME}"), key=_written, default=None)
        raise CheckpointError(
            f"the run was gated, but {' and '.join(map(str, folders))} hold no {checkpoint.NAME}: it may have been "
            "stopped between the trainer's save and the gate's. "
            + (f"Resume from {whole.parent}, which holds one" if whole is not None else "Resume from an older one")
            + ", or, where it lies elsewhere, call gate.load(folder) before trainer.train(resume_from_checkpoint=...)"
        )
    log.warning("the checkpoint is of a run without a gate; its schedule goes on at step %d", state.global_step)
    gate.step = state.global_step


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _see_that_a_step_is_sparse(gate: Gate, state: TrainerState) -> None:
    """Or the user is told: a short run may end before the schedule's first sparse step."""
    config, steps = gate.config, state.max_steps
    first, cycles = config.first_sparse, config.schedule == "cycled"
    if first is not None and (first >= steps or config.is_full(first)):
        gate.note(
            f"all {steps} steps of this run are full, and nothing is left out: the first sparse step would be step "
            f"{first} (Config.warmup={config.warmup}"
            + (f", then full_steps={config.full_steps} of each cycle" if cycles else "")
            + f"). For a run of this length set, say, regate.Config(warmup={steps // 10}"
            + (f", cycle={max(steps // 10, 8)}, full_steps={max(steps // 80, 1)})" if cycles else ")")
        )


def _see_how_it_ends(gate: Gate, state: TrainerState) -> None:
    """What sparse steps leave out may be forgotten until the next full step, and behind the last one there is none."""
    config, steps = gate.config, state.max_steps
    last = next((step for step in range(steps - 1, -1, -1) if config.full_share(step) > 0), None)
    if config.full_steps and last is not None and steps - 1 - last >= config.full_steps:
        gate.note(
            f"this run ends {steps - 1 - last} steps after its last full one. Words that sparse steps leave out can be "
            "forgotten meanwhile, and full steps bring them back (docs/evidence.md): set "
            f"regate.Config(total_steps={steps}, final_full_steps={config.full_steps}), or schedule='interleaved', "
            "which has full samples in every step"
        )


def _teach(gate: Gate, args: TrainingArguments, dataloader: Any) -> None:
    """Reference losses of the whole training set, by the model itself, a part of the samples on each rank."""
    if not has_length(dataloader):
        raise ConfigError(
            "the model itself is the teacher until its first step, and so must go through the whole training set "
            f"before; {type(getattr(dataloader, 'dataset', dataloader)).__name__} has no length. Use a data set with "
            "one, or keep a copy (teacher='copy' or '4bit'), or pass teacher='precomputed' and call "
            "gate.precompute(batches) before trainer.train()"
        )
    with random_numbers_kept(), _precision(args):
        gate.precompute(own_part(dataloader, args.train_batch_size), progress=not args.disable_tqdm, split=True)


def _precision(args: TrainingArguments) -> contextlib.AbstractContextManager[Any]:
    """As the trainer runs the model."""
    if not (args.bf16 or args.fp16):
        return contextlib.nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)


def _of_trl(args: TrainingArguments) -> str | None:
    """The name of TRL's own class among those of the arguments."""
    return next((c.__name__ for c in type(args).__mro__ if c.__module__.partition(".")[0] == "trl"), None)


def _was_gated(state: TrainerState) -> bool:
    callbacks: Any = state.stateful_callbacks or {}  # as read from JSON
    stored = callbacks.get(GateCallback.__name__, {})
    return bool(stored.get("attributes", {}).get("gated"))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or "") / f"checkpoint-{state.global_step}"


def _gate(model: nn.Module | None) -> Gate | None:
    return None if model is None else gate_of(model)


def register() -> None:
    """Make the callback a default of the trainers that are made from now on."""
    if GateCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(GateCallback)  # type: ignore[arg-type]
