"""What gating can gain at most, from token counts alone: the README's table.

    python -m benchmarks.possible [--keep 0.5]

A sample of V visual, P prompt and A answer tokens computes V + P + n positions on a sparse step: with the paper's
alignment n is keep*A, with kept tokens computed beside their predictors up to keep*(2 - keep)*A, fewer where kept words
stand together. Work that is linear in positions (projections and MLPs, most of a large decoder) falls by that ratio;
attention falls more.
"""

from __future__ import annotations

import argparse
from math import ceil

from benchmarks.workloads import WORKLOADS
from regate import Config
from regate.insight.estimate import Sample, answer_positions


def gain(sample: Sample, config: Config) -> float:
    """Positions of a dense step over those of a sparse one."""
    kept = answer_positions(sample.answer, ceil(config.keep * sample.answer - 1e-6), config)
    return sample.total / (sample.visual + sample.prompt + kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=Config().keep)
    keep = parser.parse_args().keep
    ways = Config(keep=keep), Config.paper(keep=keep)
    sparse = 1 - ways[0].full_steps / ways[0].cycle
    print("| workload | V / P / A | answers' share | sparse step, whole cycle | the same with the paper's alignment |")
    print("|---|---|---|---|---|")
    for name, w in WORKLOADS.items():
        gains = [gain(w, config) for config in ways]
        told = " | ".join(f"{g:.2f}x, {1 / (sparse / g + 1 - sparse):.2f}x" for g in gains)
        print(f"| {name} | {w.visual} / {w.prompt} / {w.answer} | {w.answer / w.total:.0%} | {told} |")


if __name__ == "__main__":
    main()
