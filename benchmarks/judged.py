"""How often the interval of a judge that people correct holds the truth.

Enters: nothing. Leaves: a line a number of labels, and benchmarks/results/judged-DATE.json with every setting.
Refuses: nothing.

    python -m benchmarks.judged [--trials 2000] [--labels 10 30 50 100]

People say 1 to a share of the items; a judge says 1 to a share of those (its sensitivity) and 0 to a share of the
others (its specificity). Three-valued scores stand for pairs with ties.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from benchmarks.gate import RESULTS, Rate
from fmops.evaluation.judged import powered_mean

Draw = Callable[[random.Random], tuple[float, float]]
RATES = (0.02, 0.1, 0.3, 0.5)
JUDGES = {
    "perfect": (1.0, 1.0), "nearly perfect": (0.97, 0.97), "good": (0.9, 0.9), "generous": (1.0, 0.3),
    "a coin": (0.5, 0.5), "the wrong way round": (0.1, 0.1),
}  # fmt: skip
TIES = {"mostly ties": (0.05, 0.9, 0.05), "ties": (0.3, 0.2, 0.5)}
UNLABELLED = (190, 1000)


def zero_or_one(rng: random.Random, rate: float, sensitivity: float, specificity: float) -> tuple[float, float]:
    """One item's scores by people and by the judge."""
    truth = rng.random() < rate
    return float(truth), float(rng.random() < sensitivity if truth else rng.random() >= specificity)


def three_valued(rng: random.Random, shares: tuple[float, ...], agreement: float) -> tuple[float, float]:
    """The same with ties; a judge that does not agree says 1."""
    (truth,) = rng.choices((0.0, 0.5, 1.0), shares)
    return truth, truth if rng.random() < agreement else 1.0


def settings() -> Iterator[tuple[str, float, Draw]]:
    """Name, true mean, and what draws an item."""
    for rate, (name, (yes, no)) in product(RATES, JUDGES.items()):
        yield f"rate {rate}, judge {name}", rate, partial(zero_or_one, rate=rate, sensitivity=yes, specificity=no)
    for (name, shares), agreement in product(TIES.items(), (0.95, 0.5)):
        truth = shares[1] / 2 + shares[2]
        yield f"{name}, judge agrees on {agreement}", truth, partial(three_valued, shares=shares, agreement=agreement)


def covered(draw: Draw, truth: float, *, labels: int, unlabelled: int, trials: int) -> tuple[int, float]:
    """Trials of which the interval holds the truth, and its mean width."""
    rng = random.Random(f"{labels}/{unlabelled}/{truth}")
    hits, width = 0, 0.0
    for _ in range(trials):
        people, judge = zip(*(draw(rng) for _ in range(labels)), strict=True)
        found = powered_mean(people, judge, [draw(rng)[1] for _ in range(unlabelled)])
        hits += found.lower <= truth <= found.upper
        width += found.upper - found.lower
    return hits, width / trials


def main() -> None:
    """Print the least and the mean coverage of each number of labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 30, 50, 100])
    given = parser.parse_args()
    rows = []
    for labels in given.labels:
        mine = []
        for many, (name, truth, draw) in product(UNLABELLED, settings()):
            hits, width = covered(draw, truth, labels=labels, unlabelled=many, trials=given.trials)
            low, high = Rate(name, hits, given.trials, "0.95").bounds
            mine.append({
                "labels": labels, "unlabelled": many, "setting": name, "covered": hits / given.trials,
                "low": low, "high": high, "width": width,
            })  # fmt: skip
        rows += mine
        least = min(mine, key=lambda row: row["covered"])
        mean = sum(row["covered"] for row in mine) / len(mine)
        below = sum(row["high"] < 0.95 for row in mine)
        print(
            f"{labels} labels, {len(mine)} settings: covered {mean:.3f} on average; least {least['covered']:.3f} "
            f"({least['low']:.3f}–{least['high']:.3f}; {least['setting']}, {least['unlabelled']} others); "
            f"{below} surely below 0.95; mean width {sum(row['width'] for row in mine) / len(mine):.2f}",
            flush=True,
        )
    path = RESULTS / f"judged-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps({"trials": given.trials, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
