"""QLoRA on one GPU: the language model in 4 bits, LoRA on top, Hugging Face Trainer.

    python -m examples.qlora --model PATH_OR_HUB_ID --data conversations.json

The teacher costs no memory: it is the same 4-bit model with its LoRA switched off. Without a GPU the tiny model
runs on bitsandbytes' CPU kernels.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

import regate
from examples.common import collator, config, load, parser
from examples.conversations import Conversations


def main(argv: list[str] | None = None) -> regate.Report:
    args = parser(__doc__, "qlora", lr=1e-4).parse_args(argv)
    has_gpu = torch.cuda.is_available()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_gpu else torch.float32,
    )
    model, processor, records = load(
        args, quantization_config=quantization, device_map={"": 0 if has_gpu else "cpu"}, dtype=torch.float32
    )
    checkpointing = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    gate = regate.apply(model, config(args))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            bf16=has_gpu,
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
        ),
        train_dataset=Conversations(records, processor),
        data_collator=collator(processor),
    )
    trainer.train()
    model.save_pretrained(args.out)  # the adapter alone, as PEFT has it
    print(gate.report())
    return gate.report()


if __name__ == "__main__":
    main()
