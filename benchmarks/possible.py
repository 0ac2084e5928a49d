"""What gating can gain at most, from token counts alone: the README's table.

    python benchmarks/possible.py [--keep 0.5]

A sample of V visual, P prompt and A answer tokens computes V + P + keep*A positions on a sparse step. Work that is
linear in positions (projections and MLPs, most of a large decoder) falls by that ratio; attention falls more.
"""

from __future__ import annotations

import argparse

from regate import Config

WORKLOADS = [
    ("video question answering (VideoLLaMA2)", 1352, 60, 110),
    ("video captions (VideoLLaMA2)", 1352, 30, 300),
    ("video question answering (VideoChat2)", 96, 60, 100),
    ("video captions (VideoChat2)", 96, 60, 400),
    ("image captions (LLaVA)", 576, 60, 300),
    ("video (InternVL)", 2048, 60, 100),
    ("long answers, no image", 0, 100, 900),
]


def gain(visual: int, prompt: int, answer: int, keep: float) -> float:
    """Positions of a dense step over those of a sparse one."""
    return (visual + prompt + answer) / (visual + prompt + keep * answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=Config().keep)
    keep = parser.parse_args().keep
    sparse = 1 - Config().full_steps / Config().cycle
    print("| workload | V / P / A | answers' share | sparse step | whole cycle |")
    print("|---|---|---|---|---|")
    for name, v, p, a in WORKLOADS:
        g = gain(v, p, a, keep)
        cycle = 1 / (sparse / g + 1 - sparse)
        print(f"| {name} | {v} / {p} / {a} | {a / (v + p + a):.0%} | {g:.2f}x | {cycle:.2f}x |")


if __name__ == "__main__":
    main()
