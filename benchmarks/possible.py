"""What gating can gain, from token counts alone: the README's table.

    python -m benchmarks.possible

FLOPs of a language model in the shape of Qwen2.5-VL-7B (`regate.estimate`), dense ones without padding and with all
logits over those of exact mode, of a sparse step by itself, and of whole runs with the default's schedule. The teacher
reads each text once, whatever the epochs: the language model itself, or a smaller one of its family, in the shape of
Qwen2.5-0.5B.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import Qwen2_5_VLConfig, Qwen2Config

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
SMALL = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936,
)  # fmt: skip
STEPS = 5000  # of an epoch, so that warm-up is a fiftieth of it


def main() -> None:
    model = estimate.build_on_meta(SHAPE)
    small = estimate.build_on_meta(SMALL)
    found = {id(m): estimate.inspect(m) for m in (model, small)}
    default = Config()
    alone = replace(default, reference_weight=0.0)
    print(
        "| workload | V / P / A | answers | exact mode | sparse step | one epoch | three | one, small teacher "
        "| one, no teacher | teacher, of an epoch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with replaced(estimate, inspect=lambda model, **options: found[id(model)]):
        for name, w in WORKLOADS.items():
            sample = [(w.visual, w.prompt, w.answer)]
            one, three, by_small, no_teacher = (
                estimate.estimate(model, sample, config, epochs=epochs, steps=epochs * STEPS, teacher=teacher)
                for config, epochs, teacher in (
                    (default, 1, None), (default, 3, None), (default, 1, small), (alone, 1, None),
                )
            )  # fmt: skip
            told = (one.full, one.sparse, one.run, three.run, by_small.run, no_teacher.run)
            told = " | ".join(f"{x:.2f}x" for x in told)
            print(
                f"| {name} | {w.visual} / {w.prompt} / {w.answer} | {w.answer / w.total:.0%} | {told} | "
                f"{one.teacher:.0%} |"
            )


if __name__ == "__main__":
    main()
