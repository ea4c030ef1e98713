"""How much poison the feedback screen lets through, and how many honest rows it sets aside.

    python -m benchmarks.feedback [--seeds 40]

Simulated: 2,000 ordinary prompts of 50 people, a fifth of them corrected; an attack of n strangers, one row each, whose
prompts hold one rare phrase. Writes one line a size: caught and honest rows set aside, with Clopper–Pearson bounds.
"""

from __future__ import annotations

import argparse
import random

from scipy.stats import beta

from fmops.feedback.gather import gather
from fmops.traces import Feedback, Trace

TOPICS = ("lists", "dictionaries", "decorators", "generators", "imports", "classes", "slices", "files", "sets", "loops")
ASKING = ("How do I use {}?", "Explain {} to me.", "Why do {} behave so?", "Show me {} in an example.", "What are {}?")
SIZES = (0, 5, 10, 25, 50, 100, 250)


def bounds(hits: int, n: int) -> tuple[float, float]:
    """Clopper–Pearson, 95 %."""
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return float(low), float(high)


def asked(number: int, user: str, extra: str, rng: random.Random) -> Trace:
    """One answered question."""
    return Trace(
        id=f"r-{number}", started_s=float(rng.randrange(100_000)), tenant="team", user=user, arm="champion",
        release="release-1", operation="chat", status=200, finish_reason="stop", duration_s=1.0,
        prompt=f"{rng.choice(ASKING).format(rng.choice(TOPICS))} {extra}Case {number}.", response=f"Answer {number}.",
    )  # fmt: skip


def corrected(trace: Trace) -> Feedback:
    """A correction of its own by whoever asked."""
    return Feedback(
        id=trace.id, at_s=trace.started_s, tenant=trace.tenant, user=trace.user, correction=f"Better {trace.id}."
    )


def once(size: int, seed: int) -> tuple[int, int, int]:
    """Poisoned rows caught, honest rows set aside, honest rows."""
    rng = random.Random(seed)
    ordinary = [asked(i, f"person-{rng.randrange(50)}", "", rng) for i in range(2000)]
    attack = [asked(10_000 + i, f"stranger-{i}", "cf zircon ", rng) for i in range(size)]
    honest = rng.sample(ordinary, 400)
    made = gather(ordinary + attack, [corrected(trace) for trace in honest + attack])
    aside = {row["id"] for row in made.quarantine}
    return len(aside & {t.id for t in attack}), len(aside & {t.id for t in honest}), len(honest)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    seeds = parser.parse_args().seeds
    print("| poisoned rows | caught | 95 % | honest set aside | 95 % |\n|---:|---:|---|---:|---|")
    for size in SIZES:
        caught, wrong, honest = (sum(each) for each in zip(*(once(size, seed) for seed in range(seeds)), strict=True))
        n = size * seeds
        share = "{:.4f}–{:.4f}".format(*bounds(caught, n)) if n else "–"
        aside = "{:.4f}–{:.4f}".format(*bounds(wrong, honest))
        print(f"| {size} | {caught} of {n} | {share} | {wrong} of {honest} | {aside} |")


if __name__ == "__main__":
    main()
