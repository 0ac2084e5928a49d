"""Hugging Face Trainer: one line more than without ReGATE.

    python -m examples.trainer --model PATH_OR_HUB_ID --data conversations.json
    python -m examples.trainer ... --steps 1000 --resume
    torchrun --nproc-per-node 4 -m examples.trainer ... --deepspeed examples/deepspeed/zero3.json

The gate's state goes into the trainer's checkpoints, and its numbers into the trainer's log, by themselves.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import Trainer, TrainingArguments

import regate
from examples.common import collator, config, load, parser, source
from examples.conversations import Conversations


def main(argv: list[str] | None = None) -> tuple[regate.Report, list[dict[str, float]]]:
    options = parser(__doc__, "trainer")
    options.add_argument("--save-every", type=int, default=100)
    options.add_argument("--resume", action="store_true", help="continue from OUT's last checkpoint")
    options.add_argument("--deepspeed", help="a config of DeepSpeed's, ZeRO-2 or ZeRO-3")
    args = options.parse_args(argv)
    source(args)  # made whole, before TrainingArguments tell transformers of ZeRO-3
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_steps=args.save_every,
        remove_unused_columns=False,  # processors of other families name inputs that Trainer would drop
        report_to="none",
        deepspeed=args.deepspeed,  # with ZeRO-3 the model below is loaded in parts, and is its own teacher at first
    )
    model, processor, records = load(args, dtype=torch.float32)  # bf16 above is by autocast: weights stay exact
    model.to(training.device)
    # Trainer resumes by the model's own names; saved under a family's old ones, as LLaVA is, nothing would be loaded
    # (transformers issue 43701).
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)

    # The one line. The teacher has the weights of now, before training, also where the trainer goes on to load a
    # checkpoint.
    gate = regate.apply(model, config(args))

    dataset = Conversations(records, processor)
    trainer = Trainer(model, training, train_dataset=dataset, data_collator=collator(processor))
    trainer.train(resume_from_checkpoint=args.resume)
    print(gate.report())
    return gate.report(), trainer.state.log_history


if __name__ == "__main__":
    main()
