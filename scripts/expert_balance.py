"""How uneven the load of expert parallelism is before and after experts are placed by it.

    python scripts/expert_balance.py [--json PATH]

A synthetic router: 256 experts, 8 for each token, of which some are liked more, the liking being a power of their rank;
16 devices. The load of one half of the tokens chooses the placement, that of the other half is what it is measured by:
tokens of the busiest device relative to the mean.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from jaxllm import placement

EXPERTS, CHOSEN, RANKS, TOKENS, LAYERS = 256, 8, 16, 8192, 8


def loads(rng: np.random.Generator, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each expert in both halves of a skewed layer."""
    liking = rng.permutation(np.log(1 / np.arange(1, EXPERTS + 1) ** power))
    # The best few of noisy scores are a draw without replacement by those weights (Gumbel).
    scores = liking + rng.gumbel(size=(2 * TOKENS, EXPERTS))
    chosen = np.argpartition(-scores, CHOSEN, axis=1)[:, :CHOSEN]
    first, second = (np.bincount(half.ravel(), minlength=EXPERTS) for half in np.split(chosen, 2))
    return first, second


def measure() -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    rows = []
    for power in (0.0, 0.5, 1.0):
        layers = [loads(rng, power) for _ in range(LAYERS)]
        for slots in (256, 272, 288):
            before = placement.in_turn(EXPERTS, slots)
            pairs = []
            moved = []
            for first, second in layers:
                after = placement.choose(first, before, RANKS)
                pairs.append([placement.imbalance(second, which, RANKS) for which in (before, after)])
                moved.append(sum(a != b for a, b in zip(before, after, strict=True)))
            old, new = np.mean(pairs, axis=0)
            row = {"skew": power, "num_slots": slots, "before": old, "after": new, "slots_moved": np.mean(moved)}
            rows.append({key: round(float(value), 3) for key, value in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    rows = measure()
    print(f"{'skew':>5} {'slots':>6} {'before':>7} {'after':>6} {'moved':>6}   busiest of {RANKS} devices / mean")
    for row in rows:
        print("{skew:>5} {num_slots:>6.0f} {before:>7.2f} {after:>6.2f} {slots_moved:>6.0f}".format(**row))
    if arguments.json:
        shape = {"experts": EXPERTS, "chosen": CHOSEN, "devices": RANKS, "tokens": TOKENS, "layers": LAYERS}
        arguments.json.write_text(json.dumps({"router": shape, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
