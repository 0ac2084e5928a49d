"""Hugging Face Trainer as anybody writes it: this script never heard of ReGATE.

    python -m examples.trainer_without_regate                                       trains dense
    regate run --warmup 1 --cycle 4 --full-steps 1 -- python -m examples.trainer_without_regate        trains gated

`--model` and `--data` are as in the other examples. `regate run --help` lists the settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from examples.conversations import Conversations, collate, read
from examples.demo import captions, tiny


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or local path; default: a tiny LLaVA, made here")
    parser.add_argument("--data", help="JSON or JSON-lines of conversations; default: a few captions of drawings")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer_without_regate"))
    args = parser.parse_args(argv)

    some = captions.load()["train"][:64]
    records = read(args.data) if args.data else [caption.record() for caption in some]
    if args.model:
        processor = AutoProcessor.from_pretrained(args.model)
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    else:
        processor = tiny.build_processor(" ".join(c.words) + " " + captions.PROMPT for c in some)
        model = tiny.build_model(processor, width=64, layers=2)
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=Conversations(records, processor),
        data_collator=lambda rows: collate(rows, processor.tokenizer.pad_token_id),
    )
    trainer.train()


if __name__ == "__main__":
    main()
