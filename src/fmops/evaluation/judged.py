"""A judge's scores, made honest by a few human ones.

Enters: scores of a judge (a model or a classifier) on many items, human scores on some of them. Leaves: a mean with an
interval that holds however wrong the judge is. Refuses: fewer than two human scores, unpaired ones.

Prediction-powered inference (Angelopoulos, Bates, Fannjiang, Jordan & Zrnic 2023, Science 382:669) with the tuned
weight of PPI++ (Angelopoulos, Duchi & Zrnic 2023, arXiv 2311.01453): the judge narrows the interval as far as it agrees
with people, and a useless judge narrows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmops.errors import FmopsError
from fmops.evaluation.statistics import normal_quantile


@dataclass(frozen=True)
class Powered:
    """A mean of human scores, estimated with the judge's help."""

    value: float
    lower: float
    upper: float
    weight: float
    """How far the judge is believed, from 0 to 1."""
    agreement: float
    """Correlation of judge and people on the items that both scored; 0 where either never varies."""
    labelled: int
    unlabelled: int


def powered_mean(
    human: Sequence[float], judge_on_human: Sequence[float], judge: Sequence[float], *, alpha: float = 0.05
) -> Powered:
    """Estimate the mean human score over all items.

    Args:
        human: scores by people.
        judge_on_human: the judge's scores of the same items, in the same order.
        judge: the judge's scores of the other items; they come from where the first ones come from.
        alpha: of the two-sided interval.

    Raises:
        FmopsError: fewer than two human scores, or not one judge's score for each.
    """
    n, many = len(human), len(judge)
    if n != len(judge_on_human):
        raise FmopsError(f"{n} human scores and {len(judge_on_human)} of the judge: give one of each for every item.")
    if n < 2 or many < 2:
        raise FmopsError(f"{n} human scores and {many} more of the judge: two of each are the least. Label more items.")
    together = _covariance(human, judge_on_human)
    # All of the judge's scores estimate its variance: it is the same judge on the same kind of item.
    spread = _covariance([*judge_on_human, *judge], [*judge_on_human, *judge])
    weight = 0.0 if spread == 0 else min(1.0, max(0.0, together / ((1 + n / many) * spread)))
    value = _mean(human) + weight * (_mean(judge) - _mean(judge_on_human))
    errors = [own - weight * other for own, other in zip(human, judge_on_human, strict=True)]
    variance = _covariance(errors, errors) / n + weight**2 * _covariance(judge, judge) / many
    reach = normal_quantile(1 - alpha / 2) * math.sqrt(variance)
    own = _covariance(human, human) * _covariance(judge_on_human, judge_on_human)
    agreement = together / math.sqrt(own) if own > 0 else 0.0
    return Powered(value, value - reach, value + reach, weight, agreement, n, many)


def preference(first: str, swapped: str) -> float:
    """What a pairwise judge says of two answers, asked in both orders.

    Args:
        first: its choice, `A`, `B` or anything else for a tie, when the challenger's answer is A.
        swapped: its choice when the challenger's answer is B.

    Returns:
        1 when it prefers the challenger both times, 0 when the champion, ½ when the order decides: a judge that likes
        the first place says nothing of the answers (Zheng et al. 2023, arXiv 2306.05685).
    """
    if (first, swapped) == ("A", "B"):
        return 1.0
    return 0.0 if (first, swapped) == ("B", "A") else 0.5


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _covariance(left: Sequence[float], right: Sequence[float]) -> float:
    a, b = _mean(left), _mean(right)
    return math.fsum((x - a) * (y - b) for x, y in zip(left, right, strict=True)) / (len(left) - 1)
