"""A plain PyTorch loop, with saving and resuming.

    python -m examples.plain_loop --model PATH_OR_HUB_ID --data conversations.json
    python -m examples.plain_loop ... --steps 1000 --resume

Without `--model` and `--data` a tiny LLaVA trains on captions of drawings, in seconds.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import regate
from examples.common import config, endless, load, loader, parser


def main(argv: list[str] | None = None) -> regate.Report:
    options = parser(__doc__, "plain_loop")
    options.add_argument("--save-every", type=int, default=100)
    options.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    args = options.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor, records = load(args, dtype=torch.float32)
    model.to(device)

    # Before any checkpoint is loaded: the teacher is the language model as it was before training.
    gate = regate.apply(model, config(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    parts = {"model": model, "optimizer": optimizer, "gate": gate}
    checkpoint, done = args.out / "checkpoint.pt", 0
    if args.resume:
        state = torch.load(checkpoint, map_location=device)
        done = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])

    batches = endless(loader(records, processor, args.batch_size), device)
    for step, batch in enumerate(islice(batches, done, args.steps), start=done):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kind = "full" if gate.last.full else "sparse"
        print(f"step {step:4} {kind:6} loss {loss.item():.3f}, {int(gate.last.active.sum())} positions computed")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(checkpoint, {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1})
    print(gate.report())
    return gate.report()


def save(path: Path, state: dict[str, Any]) -> None:
    """All or nothing: a run killed while it writes leaves the checkpoint before this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


if __name__ == "__main__":
    main()
