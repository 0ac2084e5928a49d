"""What each rank of `test_ranks` runs, and the single process that it is held to.

python -m tests.integrations.ranks FOLDER        (under torchrun, or with RANK and WORLD_SIZE set)
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import regate
from model_adapters import conventional, embedded
from regate import Config
from tests import oracle
from tests.model_adapters.test_wrappers import MyVLM
from tests.zoo import CORE, batchings
from tests.zoo.batchings import Sample

CONFIG = regate.Config(warmup=1, cycle=1000, full_steps=0, logits="all")
STEPS = 3
PATIENCE = timedelta(seconds=200)  # a rank that waits longer for another hangs


@dataclass(frozen=True)
class Cell:
    """One way of training on several ranks."""

    wrap: str
    weights: str
    checkpointing: bool
    backend: str = "eager"
    batches: str = "alike"
    teacher: str = "auto"

    def __str__(self) -> str:
        way = f"{self.wrap}-{self.weights}{'-checkpointing' * self.checkpointing}-{self.backend}-{self.batches}"
        return way if self.teacher == "auto" else f"{way}-{self.teacher}"

    @property
    def deepspeed(self) -> bool:
        return self.wrap.startswith("zero")


CELLS = [
    Cell("ddp", "full", False),
    Cell("ddp", "lora", True),
    Cell("ddp", "lora", False, "inductor"),
    Cell("fsdp2", "full", False),
    Cell("fsdp2", "full", True),
    Cell("fsdp2", "lora", False),
    Cell("fsdp2 in checkpoints", "full", False),
    Cell("fsdp2 in checkpoints", "lora", False, "inductor"),
]
CELLS += [Cell("fsdp2", "full", False, batches=kind) for kind in ("mixed", "unlabelled first", "unlabelled later")]
CELLS.append(Cell("fsdp2", "lora", False, batches="unlabelled first"))
CELLS += [Cell(wrap, "full", False, batches="full rows") for wrap in ("ddp", "fsdp2")]
CELLS += [Cell(wrap, "full", False, batches="guarded") for wrap in ("ddp", "fsdp2")]
AT_ONCE = Cell("ddp", "full", False, batches="full rows, filled up")
CELLS.append(AT_ONCE)
CELLS += [Cell("ddp", "full", False, batches="visible"), Cell("fsdp2", "lora", True, batches="visible")]
TEXT = ("text alone", "text alone in turns")  # rank 1 never has an image; each rank has none once
CELLS += [Cell("fsdp2", "full", False, batches=TEXT[0])]
CELLS += [
    Cell("fsdp2 apart", weights, checkpointing, batches=kind)
    for weights, checkpointing, kind in [
        ("full", False, TEXT[0]), ("full", True, TEXT[1]), ("lora", False, TEXT[1]), ("lora", True, TEXT[0]),
        ("frozen tower", False, TEXT[1]),
    ]
]  # fmt: skip
if importlib.util.find_spec("deepspeed"):  # which compiles a kernel for a minute before it runs on a CPU
    CELLS += [
        Cell("zero2", "full", False),
        Cell("zero3", "full", False),
        Cell("zero3", "full", True),
        Cell("zero3", "lora", False),
        Cell("zero3", "lora", True),
        Cell("zero3", "never whole", False),
        Cell("zero3", "full", False, "inductor"),
        *[Cell("zero3", "full", False, batches=kind) for kind in ("mixed", "unlabelled first", "unlabelled later")],
        Cell("zero3", "lora", False, batches="unlabelled first"),
        Cell("zero3", "full", False, batches=TEXT[0]),
        Cell("zero3", "full", True, batches=TEXT[1]),
        Cell("zero3", "lora", False, batches=TEXT[1]),
        Cell("zero3", "lora", True, batches=TEXT[0]),
        Cell("zero3", "frozen tower", False, batches=TEXT[1]),
        *[Cell("zero3", weights, False, teacher="first") for weights in ("full", "never whole")],
    ]


def build(cell: Cell, whole: Path | None = None) -> nn.Module:
    """The model; with `whole`, read from there in parts."""
    torch.manual_seed(0)
    model: Any = CORE["llava"].build() if whole is None else in_parts(whole)
    model = model if cell.wrap == "zero3" else model.double()  # which ZeRO-3 does not take
    if cell == AT_ONCE:
        model.set_attn_implementation("eager")
    if cell.weights == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        model = model if cell.wrap == "zero3" else model.double()
    if cell.weights == "frozen tower":
        model.model.vision_tower.requires_grad_(False)
    if cell.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def in_parts(folder: Path) -> nn.Module:
    """A model that no rank ever has whole, as Trainer loads it under ZeRO-3."""
    from transformers import LlavaForConditionalGeneration
    from transformers.integrations import HfDeepSpeedConfig

    asked = HfDeepSpeedConfig(settings(3))  # heard of while it lives
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    del asked
    assert all(not parameter.numel() for parameter in model.parameters())
    return model.train()


def batch_of(cell: Cell, rank: int, step: int) -> dict[str, Any]:
    """What a rank trains on in a step."""
    batch: dict[str, Any] = CORE["llava"].batch("right", seed=rank)
    if cell.batches == "mixed":  # a row without images and one with two on rank 1, one image on rank 0
        rows = [[Sample(0, ()), Sample(2, (1,))], [Sample(1, ()), Sample(3, (0, 2))]][rank]
        batch = batchings.batch("llava", rows)
    if cell.batches in TEXT:
        text = (rank, step) in ((1, 0), (0, 1)) if cell.batches == TEXT[1] else rank == 1
        rows = [[Sample(1, ()), Sample(3, (0, 2))], [Sample(0, (1,)), Sample(2, ())]][rank]
        batch = batchings.batch("llava", [replace(row, images=()) for row in rows] if text else rows)
        assert ("pixel_values" in batch) is not text
    if cell.batches.startswith("unlabelled"):
        batch["num_items_in_batch"] = torch.tensor(20)
        if (rank, step) == ((1, 0) if cell.batches == "unlabelled first" else (0, 1)):
            batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch if cell.wrap == "zero3" else oracle.double(batch)


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner: Any = conventional.unwrap(model)
    apart = [*conventional.decoder(model).layers]
    if wrap == "fsdp2 apart":  # so that a layer is waited for wherever it stands
        tower = inner.model.vision_tower
        apart += [
            *tower.encoder.layers,
            tower.embeddings,
            inner.model.multi_modal_projector,
            inner.get_input_embeddings(),
        ]
    for part in apart:
        fully_shard(part, mesh=mesh)
    if wrap == "fsdp2 in checkpoints":  # as accelerate leaves it, which then splits what is left of the wrappers
        layers = conventional.decoder(model).layers
        for i, layer in enumerate(layers):
            layers[i] = fully_shard(checkpoint_wrapper(layer, preserve_rng_state=False), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's; it would clip gradients to a norm of 1, and keep parameters as small as these whole."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1e9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    }


def zero(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """The model in DeepSpeed's engine."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))[0]


def applied_too_late(rank: int) -> str:
    """What ZeRO-3 says to a gate that comes after its engine."""
    model = CORE["llava"].build()
    engine = zero(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    regate.apply(model, CONFIG, teacher=None)
    try:
        engine(**CORE["llava"].batch("right", seed=rank))
    except regate.RegateError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def trained(model: nn.Module, wrap: str) -> dict[str, Tensor]:
    """The parameters that learn, whole."""
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if wrap != "zero3":
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in learning.items()}
        return {name.replace(_CHECKPOINT_PREFIX, ""): parameter for name, parameter in whole.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(learning.values())):
        return {n: p.detach().clone() for n, p in learning.items()}


def train(cell: Cell, rank: int | None, folder: Path | None = None) -> dict[str, Any]:
    """A few steps; `rank=None` is one process that accumulates the gradients of both ranks' batches."""
    torch._dynamo.reset()
    parts = cell.weights == "never whole"
    model = build(cell, folder if parts and rank is not None else None)
    config = CONFIG if cell.batches == "alike" else replace(CONFIG, logits="kept")
    if cell.batches.startswith("full rows"):  # one in each batch after the first step
        config = replace(config, cycle=2, full_steps=1, schedule="interleaved")
    if cell.batches == "guarded":
        config = replace(config, cycle=2, full_steps=1, guard=0.1)
    if cell.batches == "visible":
        config = replace(config, elided="visible", visual_keep=0.5)
    if cell.batches.startswith("unlabelled") or cell.batches == TEXT[1]:  # of unseen samples, one process knows more
        config = replace(config, student_weight=0.0)
    ahead, teacher = parts or cell.teacher == "first", "precomputed" if parts else cell.teacher
    if cell.teacher == "first":  # held to a copy that one process keeps
        teacher = "copy" if rank is None else "first"
    gate = regate.apply(model, config, backend=cell.backend, teacher=teacher)  # type: ignore[arg-type]
    gate.exchange.every = 1
    if cell.batches == "guarded":
        seen = {"samples": 10.0**6, "mean": 1.0, "square": 1.0, "lowest": 1.0, "left": 0, "told": [0.0] * 3}
        gate.scorer.guard.load_state_dict(seen)
    sharded = not cell.deepspeed and rank is not None
    called: Any = wrapped(model, cell.wrap) if sharded else model
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if cell.deepspeed and rank is not None:
        called = optimizer = zero(model, optimizer, int(cell.wrap[-1]))
    if ahead:
        own = range(2) if rank is None or cell.teacher != "first" else [rank]
        gate.precompute([batch_of(cell, micro, 0) for micro in own], progress=False)
    references = {key: losses.tolist() for key, losses in gate.store.items("reference")}
    losses, kept = [], []
    for step in range(STEPS):
        for micro in (0, 1) if rank is None else (rank,):
            batch = batch_of(cell, micro, step)
            loss = called(**batch).loss
            if called is optimizer:
                called.backward(loss)
            else:
                (loss / 2 if rank is None else loss).backward()
            losses.append(float(loss.detach()))
            labelled = bool((batch["labels"] != -100).any())
            kept.append(gate.last.kept if gate.last and labelled else None)
        if cell.batches == "guarded" and (rank, step) in ((None, 1), (1, 0)):  # one rank sees it, others a step later
            gate.scorer.guard._told = [10.0**4, 5e4, 2.5e5]
        optimizer.step()
        if called is not optimizer:
            optimizer.zero_grad()
    gate.flush()
    gate.exchange.finish()
    return {
        "losses": losses,
        "kept": kept,
        "weights": trained(model, cell.wrap if rank is not None else "one process"),
        "difficulty": {k: torch.from_numpy(v) for k, v in gate.store.items("difficulty")},
        "owed": {k: float(v[0]) for k, v in gate.store.items("owed")},
        "report": dict(gate.report()),
        "references": references,
        "sent": gate.exchange.bytes_sent,
    }


def storages_left(rank: int, backend: str) -> list[list[str]]:
    """In each step, the layers' parameters whose gathered values outlive the forward, waiting for the backward pass."""
    import deepspeed

    torch._dynamo.reset()
    model = CORE["llava"].build()
    regate.apply(model, replace(CONFIG, logits="kept"), backend=backend, teacher=None)
    asked = settings(3)  # which by default keeps what it soon needs again
    asked["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=asked)[0]
    gathered: dict[str, StorageWeakRef] = {}

    @torch.compiler.disable
    def look(layer: nn.Module, args: Any) -> None:
        for name, parameter in layer.named_parameters():
            assert parameter.numel() > 0
            gathered[f"{id(layer)} {name}"] = StorageWeakRef(parameter.untyped_storage())

    look.__module__ = "torch"  # not a reader of the decoder's values
    for layer in conventional.decoder(model).layers:
        layer.register_forward_pre_hook(look)
    found = []
    for _ in range(STEPS):
        loss = engine(**CORE["llava"].batch("right", seed=rank)).loss
        assert gathered
        found.append([name for name, storage in gathered.items() if not storage.expired()])
        gathered.clear()
        engine.backward(loss)
        engine.step()
    return found


def own_wrapper(rank: int) -> list[float]:
    """Losses of an own model around a causal one, keep=1: ids are read off embeddings, of which ranks have unlike many.

    Ungated first, so that the two can be compared.
    """
    found = []
    for config in (None, replace(Config.exact(), warmup=0)):
        torch._dynamo.reset()
        model = MyVLM().train()
        if config is not None:
            regate.apply(model, config, teacher=None)
        engine = zero(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
        texts = [[11, 12, 21, 22, 23, 24, 25, 26] * (1 + 2 * rank), [13, 31, 32, 33, 34]]
        photos = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(rank))
        with patch.object(embedded, "_CHUNK", 8):
            for _ in range(2):
                loss = engine(photos=photos, texts=texts, answers=[6, 4]).loss
                engine.backward(loss)
                engine.step()
                found.append(float(loss.detach()))
    return found


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


def fingerprints(folder: Path) -> list[dict[str, str]]:
    """The teacher's, of a model that no rank has whole, and of the same one whole."""
    from transformers import LlavaForConditionalGeneration

    models = in_parts(folder), LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return [regate.apply(model, CONFIG, teacher="first").scorer.taught_by for model in models]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", timeout=PATIENCE)
    rank = dist.get_rank()
    if rank == 0:
        CORE["llava"].build().save_pretrained(folder / "model")
    dist.barrier()
    found: dict[str, Any] = {str(cell): train(cell, rank, folder / "model") for cell in CELLS}
    if importlib.util.find_spec("deepspeed"):
        found["too late"] = applied_too_late(rank)
        found["left"] = {backend: storages_left(rank, backend) for backend in ("eager", "inductor")}
        found["own wrapper"] = own_wrapper(rank)
        found["fingerprints"] = fingerprints(folder / "model")
    found["checkpoints"] = checkpoints(rank, folder / "checkpoint")
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
