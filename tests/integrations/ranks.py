"""What each rank of `test_ranks` runs, and the single process that it is held to.

python -m tests.integrations.ranks FOLDER        (under torchrun, or with RANK and WORLD_SIZE set)
"""

from __future__ import annotations

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

CONFIG = regate.Config(warmup=1, cycle=1000, full_steps=0)
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


def train(cell: Cell, rank: int | None) -> dict[str, Any]:
    """A few steps; `rank=None` is one process that accumulates the gradients of both ranks' batches."""
    torch._dynamo.reset()
    model = build(cell)
    gate = regate.apply(model, CONFIG, backend=cell.backend)
    gate.exchange.every = 1
    called = model if rank is None else wrapped(model, cell.wrap)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses, kept = [], []
    for _ in range(STEPS):
        for micro in (0, 1) if rank is None else (rank,):
            loss = called(**batch_of(micro)).loss
            (loss / 2 if rank is None else loss).backward()
            losses.append(float(loss.detach()))
            kept.append(gate.last.kept if gate.last else None)
        optimizer.step()
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
    found["checkpoints"] = checkpoints(rank, folder / "checkpoint")
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
