"""Several GPUs with accelerate: a plain loop under DDP or FSDP2.

    accelerate launch --config_file examples/accelerate/ddp.yaml -m examples.multi_gpu --model ... --data ...
    accelerate launch --config_file examples/accelerate/fsdp2.yaml -m examples.multi_gpu --model ... --data ...
    python -m examples.multi_gpu                    # one process

Two processes of a machine without GPUs: --num_processes 2. (Not --cpu: with it accelerate starts one process.)
Several nodes: run the same command on every node, with --num_machines, --machine_rank, --main_process_ip and
--main_process_port, and --num_processes for all nodes together. Or by torchrun, which gives DDP:

    ACCELERATE_MIXED_PRECISION=bf16 torchrun --nnodes 2 --nproc_per_node 4 \\
        --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500 -m examples.multi_gpu --model ... --data ...

Every process takes the same decision (full or sparse) without asking the others, because steps are counted alike.
"""

from __future__ import annotations

from itertools import islice

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

import regate
from examples.common import config, endless, load, loader, parser


def main(argv: list[str] | None = None) -> regate.Report:
    options = parser(__doc__, "multi_gpu")
    options.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint")
    args = options.parse_args(argv)

    # Before the process group exists, or only the first process could save the tiny model. Mixed precision is
    # accelerate's, from the config file, and keeps these float32 weights.
    model, processor, records = load(args, dtype=torch.float32)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # not told, it starts no process group on CPUs
        # A batch without an image leaves the projector without gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    model.to(accelerator.device)
    # As usual. Besides, encoders have parameters past the layer that is read, which are never given a gradient; FSDP's
    # optimizer checkpoints could not be loaded with them.
    model.get_encoder(modality="image").requires_grad_(False)

    # Before `prepare`, while weights are whole, and on the device, where the teacher's copy stays. The store is a
    # directory so that processes share it: a sample may come to another process in the next epoch. It belongs on a
    # local disk, one for each node.
    gate = regate.apply(model, config(args), store=str(args.out / "store"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    batches = loader(records, processor, args.batch_size)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    accelerator.register_for_checkpointing(gate)
    if args.resume:
        accelerator.load_state(args.out / "checkpoint")

    for batch in islice(endless(batches, accelerator.device), gate.step, args.steps):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        kind = "full" if gate.last.full else "sparse"
        accelerator.print(f"{kind:6} loss {loss.item():.3f}, {int(gate.last.active.sum())} positions computed here")
    accelerator.save_state(args.out / "checkpoint")
    accelerator.print(gate.report())
    accelerator.end_training()
    return gate.report()


if __name__ == "__main__":
    main()
