"""What gating can gain at most, from token counts alone: the README's table.

    python -m benchmarks.possible [--keep 0.5]

A sample of V visual, P prompt and A answer tokens computes V + P + keep*A positions on a sparse step. Work that is
linear in positions (projections and MLPs, most of a large decoder) falls by that ratio; attention falls more.
"""

from __future__ import annotations

import argparse

from benchmarks.workloads import WORKLOADS
from regate import Config
from regate.insight.estimate import Sample


def gain(sample: Sample, keep: float) -> float:
    """Positions of a dense step over those of a sparse one."""
    return sample.total / (sample.total - (1 - keep) * sample.answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=Config().keep)
    keep = parser.parse_args().keep
    sparse = 1 - Config().full_steps / Config().cycle
    print("| workload | V / P / A | answers' share | sparse step | whole cycle |")
    print("|---|---|---|---|---|")
    for name, w in WORKLOADS.items():
        g = gain(w, keep)
        cycle = 1 / (sparse / g + 1 - sparse)
        print(f"| {name} | {w.visual} / {w.prompt} / {w.answer} | {w.answer / w.total:.0%} | {g:.2f}x | {cycle:.2f}x |")


if __name__ == "__main__":
    main()
