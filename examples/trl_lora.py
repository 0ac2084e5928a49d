"""TRL's SFTTrainer with LoRA.

    python -m examples.trl_lora --model PATH_OR_HUB_ID --data conversations.json

`regate.apply` comes after the trainer has made the PEFT model. The teacher is then the same model with its LoRA
switched off, and no copy is made.
"""

from __future__ import annotations

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import regate
from examples.common import config, load, parser
from examples.conversations import Record


def main(argv: list[str] | None = None) -> regate.Report:
    args = parser(__doc__, "trl_lora", lr=1e-4).parse_args(argv)
    model, processor, records = load(args, dtype="auto")
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            bf16=torch.cuda.is_available(),
            max_length=None,  # cutting a sequence could cut an image in two
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=dataset(records),
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    gate = regate.apply(trainer.model, config(args))
    trainer.train()
    trainer.save_model()
    print(gate.report())
    return gate.report()


def dataset(records: list[Record]) -> Dataset:
    """Prompt and completion: TRL then trains on the completion alone, and only answers can be elided."""
    rows = [
        {
            "prompt": record["messages"][:-1],
            "completion": record["messages"][-1:],
            "images": [str(image) for image in record["images"]],
        }
        for record in records
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


if __name__ == "__main__":
    main()
