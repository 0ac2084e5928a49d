"""What each rank of `test_pace` runs, and the single process that it is held to.

python -m tests.integrations.ranks_pace FOLDER        (with RANK and WORLD_SIZE set)
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import regate
from tests.zoo.common import TEXT

CONFIG = regate.Config(warmup=1, cycle=1000, full_steps=0, student_weight=0.0)
STEPS = 2
# What the batches of two ranks hold, and who joins in what the other runs.
WALKS = {
    "photos and text": (("2 photos",), (), (False, True)),
    "text and photos": ((), ("2 photos",), (True, False)),
    "photos and sounds": (("2 photos",), ("sounds",), (True, True)),
    "photos and all": (("1 photo",), ("2 photos", "sounds"), (True, False)),
    "more and fewer photos": (("2 photos",), ("1 photo",), (False, True)),
    "text and text": ((), (), (False, False)),
}


class Wrapper(nn.Module):
    """Sees and hears, before it looks up embeddings; without either it leaves these to the language model.

    Photos go through the encoder one by one, which learns statistics and drops values, and each ends with a separator.
    Of what the listener returns, the second half comes from a layer that nobody needs.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.listener = Listener()
        self.projector, self.separator = nn.Linear(16, 32), nn.Parameter(torch.randn(1, 32))
        self.llm: Any = LlamaForCausalLM(LlamaConfig(**TEXT))

    def forward(self, texts: Tensor, *, photos: list[Tensor] | None = None, sounds: Tensor | None = None) -> Any:
        """Of texts [B, S], the last three ids are the answer; photos [4, 5] and sounds [4, 3] are the first one's."""
        labels = texts.clone()
        labels[:, :-3] = -100
        seen: list[Tensor] = []
        for photo in photos or []:
            seen += [self.projector(self.encoder(photo)), self.separator]
        if sounds is not None:
            seen.append(self.projector(self.listener(sounds)["heard"]))
        if not seen:
            return self.llm(input_ids=texts, labels=labels)
        embedded = self.llm.get_input_embeddings()(texts)
        features = torch.cat(seen)
        first = torch.cat([features, embedded[0]])
        rows = [first, *(F.pad(row, (0, 0, len(features), 0)) for row in embedded[1:])]
        mask = torch.ones(len(texts), len(first), dtype=torch.int64)
        mask[1:, : len(features)] = 0
        labels = F.pad(labels, (len(features), 0), value=-100)
        return self.llm(inputs_embeds=torch.stack(rows), attention_mask=mask, labels=labels)


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 16)

    def forward(self, sounds: Tensor) -> dict[str, Tensor]:
        heard = self.first(sounds)
        return {"heard": heard, "more": self.second(heard)}


def batch_of(walk: str, rank: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(rank)
    held = WALKS[walk][rank]
    batch: dict[str, Any] = {"texts": torch.randint(3, 90, (2, 9), generator=random)}
    photos = [torch.randn(4, 5, generator=random, dtype=torch.double) for _ in range(2)]
    if any("photo" in kind for kind in held):
        batch["photos"] = photos[: 1 + ("2 photos" in held)]
    if "sounds" in held:
        batch["sounds"] = torch.randn(4, 3, generator=random, dtype=torch.double)
    return batch


def train(walk: str, rank: int | None) -> dict[str, Any]:
    """A few steps; `rank=None` is one process that accumulates the gradients of both ranks' batches."""
    torch._dynamo.reset()
    model: Any = Wrapper().double().train()
    gate = regate.apply(model, CONFIG)
    if rank is not None:
        mesh = init_device_mesh("cpu", (2,))
        for part in (model.encoder, model.listener, model.projector, *model.llm.model.layers):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, drawn, statistics, without = [], [], [], set[str]()
    for step in range(STEPS):
        for micro in (0, 1) if rank is None else (rank,):
            torch.manual_seed(step)
            loss = model(**batch_of(walk, micro)).loss
            losses.append(float(loss.detach()))
            drawn.append(float(torch.rand(())))
            statistics.append(model.encoder[1].running_mean.clone())
            (loss / 2 if rank is None else loss).backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        optimizer.step()
        optimizer.zero_grad()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in model.named_parameters()}
    joined = gate.report()["forwards_joined"]
    return {
        "losses": losses, "drawn": drawn, "statistics": statistics, "without": without, "weights": whole,
        "joined": joined, "text": str(gate.report()),
    }  # fmt: skip


def refused(rank: int) -> str:
    """What is said where embeddings are split by themselves, and looked up on ranks with photos alone."""
    torch._dynamo.reset()
    model: Any = Wrapper().double().train()
    regate.apply(model, CONFIG, teacher=None)
    for part in (model.encoder, model.projector, model.llm.get_input_embeddings(), model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    try:
        model(**batch_of("photos and text", rank))
    except regate.RegateError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    found: dict[str, Any] = {walk: train(walk, rank) for walk in WALKS}
    torch.save(found | {"refused": refused(rank)}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
