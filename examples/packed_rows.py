"""Packed rows with Hugging Face Trainer: several samples in one row, no padding.

    python -m examples.packed_rows --model PATH_OR_HUB_ID --data conversations.json
    python -m examples.packed_rows ... --attention flash_attention_2     # on a GPU

Position ids that begin again tell where a sample begins, as with transformers' DataCollatorWithFlattening. To the gate
each sample is its own: its labels compete with those of the forward's other samples, its difficulties are found again
whatever row it comes in, and in the decoder it sees itself alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import regate
from examples.common import config, load, parser
from examples.conversations import Conversations


def main(argv: list[str] | None = None) -> regate.Report:
    options = parser(__doc__, "packed_rows")
    options.add_argument("--attention", default="sdpa", help="attn_implementation of the model")
    args = options.parse_args(argv)
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,  # samples in a row
        learning_rate=args.lr,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    )
    model, processor, records = load(args, dtype=torch.float32, attn_implementation=args.attention)
    model.to(training.device)
    gate = regate.apply(model, config(args))
    Trainer(model, training, train_dataset=Conversations(records, processor), data_collator=pack).train()
    print(gate.report())
    return gate.report()


def pack(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Samples of one row each as one row [1, S], without an attention mask."""
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    row: dict[str, Any] = {name: torch.cat([s[name] for s in samples], 1) for name in ("input_ids", "labels")}
    row["labels"][0, [sum(lengths[:n]) for n in range(len(lengths))]] = -100  # nothing before it predicts a first token
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    pictures = {name for sample in samples for name in sample} - {*row, "attention_mask"}
    return row | {name: torch.cat([s[name] for s in samples if name in s]) for name in pictures}


if __name__ == "__main__":
    main()
