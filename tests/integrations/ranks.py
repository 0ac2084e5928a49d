"""What each rank of `test_ranks` runs, and the single process that it is held to.

python -m tests.integrations.ranks FOLDER        (under torchrun, or with RANK and WORLD_SIZE set)
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import regate
from model_adapters import conventional
from tests import oracle
from tests.zoo import CORE

CONFIG = regate.Config(warmup=1, cycle=1000, full_steps=0, logits="all")
STEPS = 3


@dataclass(frozen=True)
class Cell:
    """One way of training on several ranks."""

    wrap: str
    weights: str
    checkpointing: bool
    backend: str = "eager"

    def __str__(self) -> str:
        return f"{self.wrap}-{self.weights}{'-checkpointing' * self.checkpointing}-{self.backend}"


CELLS = [
    Cell("ddp", "full", False),
    Cell("ddp", "lora", True),
    Cell("ddp", "lora", False, "inductor"),
    Cell("fsdp2", "full", False),
    Cell("fsdp2", "full", True),
    Cell("fsdp2", "lora", False),
]
if importlib.util.find_spec("deepspeed"):  # which compiles a kernel for a minute before it runs on a CPU
    CELLS.append(Cell("zero2", "full", False))


def build(cell: Cell) -> nn.Module:
    torch.manual_seed(0)
    model = CORE["llava"].build().double()
    if cell.weights == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).double()
    if cell.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch_of(rank: int) -> dict[str, Tensor]:
    return oracle.double(CORE["llava"].batch("right", seed=rank))


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in conventional.decoder(model).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def zero(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """The model in DeepSpeed's engine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    settings = {"stage": stage, "overlap_comm": False}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": settings, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def refused_by_zero3(rank: int) -> str:
    model = CORE["llava"].build()
    regate.apply(model, CONFIG, teacher=None)
    engine = zero(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    try:
        engine(**CORE["llava"].batch("right", seed=rank))
    except regate.RegateError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def train(cell: Cell, rank: int | None) -> dict[str, Any]:
    """A few steps; `rank=None` is one process that accumulates the gradients of both ranks' batches."""
    torch._dynamo.reset()
    model = build(cell)
    gate = regate.apply(model, CONFIG, backend=cell.backend)
    gate.exchange.every = 1
    sharded = cell.wrap in ("ddp", "fsdp2") and rank is not None
    called: Any = wrapped(model, cell.wrap) if sharded else model
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if cell.wrap == "zero2" and rank is not None:
        called = optimizer = zero(model, optimizer, 2)
    losses, kept = [], []
    for _ in range(STEPS):
        for micro in (0, 1) if rank is None else (rank,):
            loss = called(**batch_of(micro)).loss
            if called is optimizer:
                called.backward(loss)
            else:
                (loss / 2 if rank is None else loss).backward()
            losses.append(float(loss.detach()))
            kept.append(gate.last.kept if gate.last else None)
        optimizer.step()
        if called is not optimizer:
            optimizer.zero_grad()
    gate.flush()
    gate.exchange.finish()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": losses,
        "kept": kept,
        "weights": {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()},
        "difficulty": {k: torch.from_numpy(v) for k, v in gate.store.items("difficulty")},
        "report": dict(gate.report()),
        "sent": gate.exchange.bytes_sent,
    }


def checkpoints(rank: int, folder: Path) -> dict[str, Any]:
    """Every rank saves and loads; difficulties travel with rank 0's file."""
    model = CORE["llava"].build()
    gate = regate.apply(model, CONFIG, teacher=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(**CORE["llava"].batch("right", seed=rank)).loss.backward()
        optimizer.step()
    gate.save(folder)
    dist.barrier()
    other = regate.apply(CORE["llava"].build(), CONFIG, teacher=None)
    other.load(folder)
    return {"step": other.step, "samples": other.store.count("difficulty"), "files": sorted(os.listdir(folder))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {str(cell): train(cell, rank) for cell in CELLS}
    if importlib.util.find_spec("deepspeed"):
        found["zero3"] = refused_by_zero3(rank)
    found["checkpoints"] = checkpoints(rank, folder / "checkpoint")
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
