"""What each rank of `test_first` runs: the model as its own teacher in a Trainer, and split by FSDP2.

python -m tests.integrations.ranks_first FOLDER        (under torchrun, or with RANK and WORLD_SIZE set)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import regate
from regate.errors import StoreError, UnsupportedShardingError
from regate.teaching.weights import lacks_weights
from tests import oracle
from tests.integrations.ranks import CELLS as WAYS
from tests.integrations.ranks import build, wrapped
from tests.zoo import CORE

CONFIG = regate.Config(warmup=1, cycle=1000, full_steps=0, logits="all")
FULL, LORA = (next(c for c in WAYS if (c.wrap, c.weights) == ("fsdp2", weights)) for weights in ("full", "lora"))
Row = dict[str, Tensor]
DEALT = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


class Rows(Dataset[Row]):
    """Single rows of one length in float64."""

    def __init__(self, number: int = 23) -> None:
        self.rows = [oracle.double(CORE["llava"].batch("none", rows=1, seed=seed, answer=9)) for seed in range(number)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return {k: v[0] for k, v in self.rows[i].items()}


def batch_of(rank: int) -> dict[str, Tensor]:
    """What a rank trains on."""
    return oracle.double(CORE["llava"].batch("right", seed=rank))


def arguments(folder: Path, **others: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "ddp_find_unused_parameters": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(options | others))


def found(gate: regate.Gate) -> dict[str, Any]:
    references = {key: losses.tolist() for key, losses in gate.store.items("reference")}
    return {"references": references, "computed": gate.report()["teacher_samples"]}


def in_a_trainer(folder: Path, choice: Any) -> dict[str, Any]:
    """`choice` is the teacher."""
    torch._dynamo.reset()
    model = build(FULL)
    gate = regate.apply(model, CONFIG, teacher=choice)
    Trainer(model, arguments(folder), train_dataset=Rows()).train()
    if choice == "copy":  # which computes what it meets
        gate.precompute(DataLoader(Rows(), batch_size=2), progress=False)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {**found(gate), "weights": weights, "sparse": gate.report()["steps_sparse"]}


def split(folder: Path, rank: int) -> dict[str, Any]:
    """FSDP2, applied to a model that has a copy of its language model: it is given up for the model itself."""
    torch._dynamo.reset()
    model = build(FULL)
    gate = regate.apply(model, CONFIG)
    assert not gate.first
    called = wrapped(model, "fsdp2")
    callback, args = regate.GateCallback(), arguments(folder)
    loader: Any = DataLoader(Rows(3), batch_size=2)  # two batches for one rank, one for the other
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model, train_dataloader=loader)
    assert gate.first
    assert all(hasattr(p, "full_tensor") for p in model.parameters()), "parameters are whole"
    result = found(gate)
    try:
        called(**batch_of(rank))
    except StoreError as error:
        result["missing"] = str(error)
    unlabelled = {**batch_of(5), "labels": torch.full_like(batch_of(5)["labels"], -100)}
    gate.precompute([batch_of(rank)] if rank else [batch_of(rank), unlabelled, batch_of(7)], progress=False)
    return result | {"losses": _train(called, [batch_of(rank)] * 3), "sparse": gate.report()["steps_sparse"]}


def split_with_adapters(rank: int) -> dict[str, Any]:
    """The base model teaches when a sample comes: on one rank alone, beside a batch without labels."""
    torch._dynamo.reset()
    model = build(LORA)
    gate = regate.apply(model, CONFIG)
    called = wrapped(model, "fsdp2")
    unlabelled = {**batch_of(5), "labels": torch.full_like(batch_of(5)["labels"], -100)}
    batches = [batch_of(rank), batch_of(rank), batch_of(rank + 2 * rank), batch_of(8) if rank else unlabelled]
    losses = _train(called, batches)
    gate.flush()
    gate.exchange.finish()
    return {**found(gate), "losses": losses}


def applied_afterwards(rank: int) -> dict[str, Any]:
    """`apply` on a model that FSDP2 has split already."""
    torch._dynamo.reset()
    model = build(FULL)
    called = wrapped(model, "fsdp2")
    gate = regate.apply(model, CONFIG)
    assert gate.first
    gate.precompute([batch_of(rank)], progress=False)
    return {**found(gate), "losses": _train(called, [batch_of(rank)] * 3)}


def dealt_out(rank: int, cell: Any) -> dict[str, Any]:
    """The first rank alone has weights when the gate comes; FSDP2 deals them out afterwards."""
    torch._dynamo.reset()
    model: Any = build(cell)
    weights = model.state_dict() if rank == 0 else {}
    beside = {module: dict(module.named_buffers(recurse=False)) for module in model.modules()}
    model = model if rank == 0 else model.to("meta")
    with patch.dict(os.environ, DEALT):
        gate = regate.apply(model, CONFIG)
    with pytest.raises(UnsupportedShardingError, match="deal out what one rank"):
        gate.precompute([batch_of(rank)], progress=False)
    called: Any = wrapped(model.to("meta"), "fsdp2")
    called.to_empty(device="cpu")
    for module, buffers in beside.items():  # some are in no checkpoint
        for name, buffer in buffers.items():
            setattr(module, name, buffer)
    dealt = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=dealt)
    if gate.first:
        gate.precompute([batch_of(rank)], progress=False)
    losses = _train(called, [batch_of(rank)] * 3)
    gate.flush()
    gate.exchange.finish()
    _goes_on(cell, gate)
    return {**found(gate), "losses": losses}


@torch.no_grad()
def _learnt(cell: Any, before: regate.Gate) -> tuple[nn.Module, regate.Gate]:
    """A model that has learnt, and a gate that came when the first rank alone had its weights: others had zeros."""
    model: Any = build(cell)
    for parameter in model.parameters():
        parameter.add_(0.01 * parameter.requires_grad)
    weights = [parameter.clone() for parameter in model.parameters()]
    with patch.dict(os.environ, DEALT):
        assert not lacks_weights(model)
        for parameter in model.parameters():
            parameter.mul_(dist.get_rank() == 0)
        gate = regate.apply(model, CONFIG, store=before.store)
    for parameter, values in zip(model.parameters(), weights, strict=True):
        parameter.copy_(values)
    return model, gate


def _goes_on(cell: Any, before: regate.Gate) -> None:
    """With its store."""
    model, gate = _learnt(cell, before)
    called = wrapped(model, "fsdp2")
    gate.load_state_dict(before.state_dict())
    called(**batch_of(dist.get_rank()))
    assert gate.report()["teacher_samples"] == before.report()["teacher_samples"]


def _train(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        if loss.isfinite():  # a batch without labels has none
            losses.append(float(loss.detach()))
        loss.nan_to_num().backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result: dict[str, Any] = {
        "split": split(folder, rank),
        "adapters": split_with_adapters(rank),
        "afterwards": applied_afterwards(rank),
        "dealt out": dealt_out(rank, FULL),
        "adapters dealt out": dealt_out(rank, LORA),
        "trainer": in_a_trainer(folder / "run", "first"),
        "copied": in_a_trainer(folder / "run", "copy"),
    }
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
