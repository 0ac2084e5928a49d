"""What gating can gain, from token counts alone: the README's table.

    python -m benchmarks.possible

FLOPs of a language model in the shape of Qwen2.5-VL-7B (`regate.estimate`), dense ones without padding and with all
logits over those of a sparse step by itself, and of whole runs with the default's schedule. The teacher reads each text
once, whatever the epochs.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import Qwen2_5_VLConfig

from benchmarks.workloads import WORKLOADS
from model_adapters.replaced import replaced
from regate import Config
from regate.insight import estimate

SHAPE = Qwen2_5_VLConfig(
    text_config={
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    vision_config={"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 3584},
)  # fmt: skip
STEPS = 5000  # of an epoch, so that warm-up is a fiftieth of it


def main() -> None:
    model = estimate.build_on_meta(SHAPE)
    found = estimate.inspect(model)
    default = Config()
    alone, paper = replace(default, reference_weight=0.0), replace(default, alignment="predictor")
    print(
        "| workload | V / P / A | answers | sparse step | one epoch | three | one, no teacher | one, paper's alignment "
        "| teacher, of an epoch |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with replaced(estimate, inspect=lambda model, **options: found):
        for name, w in WORKLOADS.items():
            sample = [(w.visual, w.prompt, w.answer)]
            one, three, no_teacher, predictor = (
                estimate.estimate(model, sample, config, epochs=epochs, steps=epochs * STEPS)
                for config, epochs in ((default, 1), (default, 3), (alone, 1), (paper, 1))
            )
            told = " | ".join(f"{x:.2f}x" for x in (one.sparse, one.run, three.run, no_teacher.run, predictor.run))
            print(
                f"| {name} | {w.visual} / {w.prompt} / {w.answer} | {w.answer / w.total:.0%} | {told} | "
                f"{one.teacher:.0%} |"
            )


if __name__ == "__main__":
    main()
