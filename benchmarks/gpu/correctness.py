"""Are the numbers right on this device? Steps of real width and a few layers, held to plain implementations."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset

import regate
from benchmarks import arms, opponents
from benchmarks.gpu.numbers import Learned, held, in_wider
from benchmarks.gpu.part import Check, Record, SkippedError
from benchmarks.models import SIZES, Size, build, causal_lm
from benchmarks.workloads import batch
from regate.insight.estimate import Sample
from regate.scoring.decision import Decision
from regate_patch import reference

STEPS = 6  # of a Trainer's run
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@dataclass(frozen=True)
class Way:
    """Of running a gated step."""

    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"
    backend: str = "eager"
    lora: bool = False
    checkpointing: bool = False
    sharded: bool = False
    visible: bool = False  # a quarter of the visual tokens computed, what is left out seen
    disable: tuple[str, ...] = ()


WAYS = {
    "bf16": Way(),
    "fp32": Way(torch.float32),
    "bf16, inductor": Way(backend="inductor"),
    "bf16, rows filled up": Way(disable=("end_to_end",)),
    "bf16, explicit masks": Way(disable=("end_to_end", "causal")),
    "bf16, checkpointing": Way(checkpointing=True),
    "bf16, checkpointing, inductor": Way(checkpointing=True, backend="inductor"),
    "bf16, LoRA": Way(lora=True),
    "bf16, LoRA, checkpointing, inductor": Way(lora=True, checkpointing=True, backend="inductor"),
    "bf16, flash 2": Way(attention="flash_attention_2"),
    "bf16, flash 3": Way(attention="flash_attention_3"),
    "bf16, FSDP2": Way(sharded=True),
    "bf16, FSDP2, checkpointing": Way(sharded=True, checkpointing=True),
    "bf16, visible": Way(visible=True),
    "bf16, visible, checkpointing, inductor": Way(visible=True, checkpointing=True, backend="inductor"),
    "fp32, visible": Way(torch.float32, visible=True),
    "fp32, inductor": Way(torch.float32, backend="inductor"),
}


def checks(size: str, device: str) -> list[Check]:
    """Of a model of that size, cut to a few layers and a small vocabulary."""
    at = Place(size, device)
    found = [Check(f"sparse step, {name}", partial(at.sparse, way), _seconds(way)) for name, way in WAYS.items()]
    some = ("bf16", "fp32", "bf16, checkpointing, inductor")
    found += [Check(f"exact step, {name}", partial(at.exact, WAYS[name]), _seconds(WAYS[name])) for name in some]
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found.append(Check(f"strongest dense step, {name}", partial(at.opponent, dtype)))
    return [*found, Check("Trainer, exact mode", at.trainer_exact, 60), Check("Trainer, sparse", at.trainer_sparse, 40)]


def _seconds(way: Way) -> float:
    return 45 if way.backend == "inductor" else 15


class Place:
    """Where checks run: a size and a device."""

    def __init__(self, size: str, device: str) -> None:
        self.device, self.size = device, SIZES[size]
        self.sample = Sample(6, 5, 13) if size == "tiny" else Sample(96, 60, 300)
        if size != "tiny":
            self.size: Size = replace(self.size, layers=3, vocabulary=32768)

    def model(
        self, dtype: torch.dtype = torch.bfloat16, *, lora: bool = False, checkpointing: bool = False
    ) -> nn.Module:
        model = build(self.size, device=self.device, dtype=dtype, lora=lora, checkpointing=checkpointing)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # from zero nothing but itself would have a gradient
                nn.init.normal_(p, std=0.02, generator=torch.Generator(p.device).manual_seed(0))
        return model

    def batch(self, seed: int = 0, rows: int = 4) -> dict[str, Tensor]:
        return batch(self.sample, rows, self.size.vocabulary, seed=seed, device=self.device)

    def sparse(self, way: Way) -> Record:
        """Against the per-layer reference, on the positions and labels that the gate chose."""
        config = arms.QUARTER if way.visible else arms.SPARSE_AFTER_ONE
        found, decision, record = self.gated(way, config, step=1)
        active, labels = (x.to(self.device) for x in (decision.active, decision.labels_left))
        data = self.batch() | {"labels": labels}
        seen = data["attention_mask"].bool() if way.visible else None

        def plain(model: nn.Module) -> Learned:
            with reference.masked(causal_lm(model).model.layers, active, seen):
                return Learned.of(model, data)

        if not 0 < int(active.sum()) < int(data["attention_mask"].sum()):
            raise AssertionError("nothing was left out")
        return record | self.held(found, plain, way)

    def exact(self, way: Way) -> Record:
        """Against the model as it is."""
        found, _, record = self.gated(way, arms.EXACT, step=1)
        return record | self.held(found, lambda model: Learned.of(model, self.batch()), way)

    def gated(self, way: Way, config: regate.Config, *, step: int) -> tuple[Learned, Decision, Record]:
        """A step under the gate: the second one, when the first has captured and proved."""
        model = self.model(way.dtype, lora=way.lora, checkpointing=way.checkpointing)
        causal_lm(model).config._attn_implementation = _installed(way.attention)
        with sharded(model, self.device) if way.sharded else _alone():
            config = replace(config, disable=way.disable)
            gate = regate.apply(model, config, teacher=None, backend=way.backend)  # type: ignore[arg-type]
            for now in (0, step):
                gate.step = now
                found = Learned.of(model, self.batch())
            decision, report = gate.last, gate.report()
            assert decision is not None
            laid = [graph.end_to_end for graph in gate._parts.handle.statistics.last]
            regate.remove(model)
        if way.attention == "sdpa" and not (way.sharded or way.visible):
            served = self.device == "cpu" or way.dtype == torch.bfloat16
            if all(laid) != (served and "end_to_end" not in way.disable):
                raise AssertionError(f"rows were laid end to end: {laid}")
        facts = {name: report[name] for name in ("graphs", "recompiles", "positions_computed")}
        return found, decision, {"laid_end_to_end": laid, **facts}

    def held(self, found: Learned, plain: Callable[[nn.Module], Learned], way: Way) -> Record:
        """To `plain` in the same type, and in a wider one."""
        model = self.model(way.dtype, lora=way.lora)
        in_same = plain(model)
        return held(found, in_same, plain(in_wider(model)))

    def opponent(self, dtype: torch.dtype) -> Record:
        """Rows end to end with logits at labels, against the padded model."""
        model, data = self.model(dtype), self.batch()
        plain = Learned.of(model, data)
        config = causal_lm(model).config
        kernel, config._attn_implementation = config._attn_implementation, opponents.KERNEL
        found = Learned.of(model, opponents.labelled(opponents.laid(data)), opponents.AtLabels(model))
        config._attn_implementation = kernel
        return held(found, plain, Learned.of(in_wider(model), data))

    def trainer_exact(self) -> Record:
        """A Trainer's losses in exact mode are those of one without a gate."""
        losses, _ = self.trained(regate.Config.exact(warmup=1, cycle=1_000, full_steps=0))
        dense, _ = self.trained(None)
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses, dense, strict=True))
        if not apart < 0.02:
            raise AssertionError(f"losses {losses}, of dense training {dense}")
        return {"losses": losses, "dense": dense, "apart": apart}

    def trainer_sparse(self) -> Record:
        """Full and sparse steps are as many as the schedule says, compiled and with checkpointing."""
        config = regate.Config.paper(warmup=2, cycle=1_000, full_steps=0)
        losses, report = self.trained(config, backend="auto", gradient_checkpointing=True)
        if report["steps_sparse"] != STEPS - 2 or not all(0 < x < float("inf") for x in losses):
            raise AssertionError(f"{report['steps_sparse']} sparse steps, losses {losses}")
        return {"losses": losses, "recompiles": report["recompiles"], "graphs": report["graphs"]}

    def trained(self, config: regate.Config | None, *, backend: str = "eager", **options: Any) -> tuple[Any, Any]:
        """The losses of a Trainer's steps, and the gate's report."""
        from transformers import Trainer, TrainingArguments

        model = self.model()
        gate = None if config is None else regate.apply(model, config, teacher=None, backend=backend)  # type: ignore[arg-type]
        defaults = {"per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 1e-5, "logging_steps": 1}
        defaults |= {"lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        defaults |= {"bf16": True, "use_cpu": self.device == "cpu", "seed": 0}
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, TrainingArguments(folder, **(defaults | options)), train_dataset=Rows(self))
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {} if gate is None else gate.report()


class Rows(Dataset[dict[str, Tensor]]):
    """One row at a time, on the CPU."""

    def __init__(self, at: Place) -> None:
        data = at.batch(rows=2 * STEPS)
        self.rows = [{name: x[i].cpu() for name, x in data.items()} for i in range(2 * STEPS)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


@contextmanager
def sharded(model: nn.Module, device: str) -> Iterator[None]:
    """By FSDP2, over one rank."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh(device, (1,))
        for layer in causal_lm(model).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _alone() -> Iterator[None]:
    yield


def _installed(attention: str) -> str:
    package = FLASH.get(attention)
    if package is not None and importlib.util.find_spec(package) is None:
        raise SkippedError(f"{package} is not installed")
    return attention
