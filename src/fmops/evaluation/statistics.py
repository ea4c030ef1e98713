"""Paired comparison: clustered errors, score intervals, Holm, power. Pure functions.

Enters: per-item differences and their clusters. Leaves: means, one-sided bounds, p-values, sample sizes.
Refuses: to estimate an error from one cluster; it is infinite.

Sources: Miller 2024 (arXiv 2411.00640, clustered errors of evaluations), Tango 1998 (Statistics in Medicine 17:891,
paired proportions), Holm 1979, Berger & Hsu 1996 (intersection–union), Liang & Zeger 1986.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A mean over items and its standard error over clusters."""

    value: float
    standard_error: float
    """Infinite when there is a single cluster."""
    n: int
    clusters: int


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> Mean:
    """Mean of items whose errors may be shared within a cluster.

    SE² = G/(G−1) · n⁻² Σ_c (Σ_{i∈c}(v_i − v̄))²; G/(G−1) corrects for few clusters and makes singletons exact.
    """
    n = len(values)
    if n == 0 or n != len(clusters):
        raise ValueError(f"{n} values and {len(clusters)} clusters")
    mean = math.fsum(values) / n
    sums: defaultdict[str, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster].append(value - mean)
    count = len(sums)
    if count < 2:
        return Mean(mean, math.inf, n, count)
    square = math.fsum(math.fsum(parts) ** 2 for parts in sums.values())
    return Mean(mean, math.sqrt(count / (count - 1) * square) / n, n, count)


def counted_mean(rows: Sequence[Mapping[str, Any]]) -> Mean:
    """Mean of the scores that count; 0 of n = 0 where none does. Errors are clustered.

    How many count is itself left to chance, so this is a ratio; with weights of 0 and 1 its linearised error is that
    of the mean of those that count.
    """
    mine = [row for row in rows if row.get("counted", True)]
    if not mine:
        return Mean(0.0, math.inf, 0, 0)
    return clustered_mean([row["score"] for row in mine], [row["cluster"] for row in mine])


def nearer_to_zero(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Mean:
    """|mean before| − |mean after| of scores that count, over pairs of rows; positive is better.

    Either arm's mean m of a share p of the items moves with an item by (score − m)/p, where it counts (the ratio
    linearised). Not valid where a mean is within its error of 0: there the size of it has no normal error.
    """
    means = [counted_mean(rows) for rows in (before, after)]
    moves = [
        [
            math.copysign(len(rows) / max(1, mean.n), mean.value) * (row["score"] - mean.value)
            if row.get("counted", True)
            else 0.0
            for row in rows
        ]
        for rows, mean in zip((before, after), means, strict=True)
    ]
    clusters = [row["cluster"] for row in before]
    spread = clustered_mean([ours - theirs for ours, theirs in zip(*moves, strict=True)], clusters)
    return Mean(abs(means[0].value) - abs(means[1].value), spread.standard_error, spread.n, spread.clusters)


def normal_quantile(probability: float) -> float:
    """The standard normal's quantile."""
    return NormalDist().inv_cdf(probability)


def t_quantile(probability: float, degrees: int) -> float:
    """Student's quantile: with few clusters the normal one would be too bold."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def t_upper_tail(value: float, degrees: int) -> float:
    """P(T > value)."""
    from scipy.special import stdtr

    return float(stdtr(degrees, -value))


def one_sided_bounds(mean: Mean, alpha: float) -> tuple[float, float]:
    """Pessimistic and optimistic end, each missed with probability at most α (clustered, Student)."""
    if math.isinf(mean.standard_error):
        return -math.inf, math.inf
    reach = t_quantile(1 - alpha, mean.clusters - 1) * mean.standard_error
    return mean.value - reach, mean.value + reach


def tango_score(won: int, lost: int, n: int, difference: float) -> float:
    """Tango's score statistic for H: P(won) − P(lost) = difference, over n pairs."""
    b = -won - lost + (2 * n - won + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    gap = won - lost - n * difference
    if variance <= 0:
        return 0.0 if gap == 0 else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


def tango_bounds(won: int, lost: int, n: int, alpha: float) -> tuple[float, float]:
    """One-sided 1−α score bounds for P(won) − P(lost); right where Wald's collapses (no discordant pair)."""
    z = normal_quantile(1 - alpha)
    centre = (won - lost) / n

    def edge(outer: float, wanted: float) -> float:
        # The score falls as the hypothesised difference grows; bisect between the estimate and the outer end.
        near, far = centre, outer
        for _ in range(80):
            middle = (near + far) / 2
            inside = abs(tango_score(won, lost, n, middle)) < wanted
            near, far = (middle, far) if inside else (near, middle)
        return (near + far) / 2

    return edge(-1.0, z), edge(1.0, z)


def tango_p(won: int, lost: int, n: int, margin: float) -> float:
    """One-sided p-value against P(won) − P(lost) ≤ −margin, by Tango's score."""
    score = tango_score(won, lost, n, -margin)
    return float(score < 0) if math.isinf(score) else 1 - NormalDist().cdf(score)


def worse_p(mean: Mean, margin: float) -> float:
    """One-sided p-value against a mean of −margin or less (clustered, Student)."""
    if math.isinf(mean.standard_error):
        return 1.0
    if mean.standard_error == 0:
        return float(mean.value <= -margin)
    return t_upper_tail((mean.value + margin) / mean.standard_error, mean.clusters - 1)


def mcnemar_p(won: int, lost: int) -> float:
    """Exact one-sided p-value for P(won) > P(lost): the discordant pairs are a fair coin under the null."""
    n = won + lost
    if n == 0:
        return 1.0
    from scipy.special import betainc

    # P(Bin(n, ½) ≥ won) = I_½(won, n − won + 1)
    return 1.0 if won == 0 else float(betainc(won, n - won + 1, 0.5))


def improvement_p(mean: Mean) -> float:
    """One-sided p-value for a mean above zero (clustered, Student). Without spread nothing is proven."""
    if not 0 < mean.standard_error < math.inf:
        return 1.0
    return t_upper_tail(mean.value / mean.standard_error, mean.clusters - 1)


def holm(p_values: Mapping[str, float], alpha: float) -> tuple[str, ...]:
    """Names whose null is rejected at family-wise level α, in the order of their p-values."""
    ordered = sorted(p_values.items(), key=lambda item: (item[1], item[0]))
    rejected = []
    for index, (name, p) in enumerate(ordered):
        if p > alpha / (len(ordered) - index):
            break
        rejected.append(name)
    return tuple(rejected)


def _reach(alpha: float, power: float, families: int) -> float:
    # All K families must pass, so each may fail with (1 − power)/K.
    return normal_quantile(1 - alpha) + normal_quantile(1 - (1 - power) / families)


def minimum_detectable(
    n: int, *, disagreement: float, alpha: float = 0.05, power: float = 0.8, families: int = 1
) -> float:
    """The smallest margin at which an equal model passes with `power`, over n paired 0/1 items.

    Args:
        n: items (clusters, if items share them).
        disagreement: share of items on which the two models differ; about 0.1 to 0.2 after a light finetune.
        families: how many families must pass together.
    """
    return _reach(alpha, power, families) * math.sqrt(disagreement / n)


def required_items(
    margin: float, *, disagreement: float, alpha: float = 0.05, power: float = 0.8, families: int = 1
) -> int:
    """Items needed for an equal model to pass the margin with `power`."""
    return math.ceil(_reach(alpha, power, families) ** 2 * disagreement / margin**2)


def detectable(mean: Mean, *, alpha: float, power: float, families: int) -> float:
    """The smallest margin at which an equal model would have passed with `power`, given the spread seen."""
    return _reach(alpha, power, families) * mean.standard_error
