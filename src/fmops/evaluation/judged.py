"""A judge's scores, made honest by a few human ones.

Enters: scores of a judge (a model or a classifier) on many items, human scores on some of them. Leaves: a mean with an
interval that holds however wrong the judge is. Refuses: too few human scores, unpaired ones, others than 0 to 1.

Prediction-powered inference (Angelopoulos, Bates, Fannjiang, Jordan & Zrnic 2023, Science 382:669) with the tuned
weight of PPI++ (Angelopoulos, Duchi & Zrnic 2023, arXiv 2311.01453): the judge narrows the interval as far as it agrees
with people, and a useless judge narrows nothing.

PPI++ takes the variance that it sees and a normal quantile, which is too bold with few labels: where no label disagrees
with the judge it sees none. So its moments are those of the labels and one more pair of each kind (both 0, both 1, and
either disagreement), as Agresti & Coull 1998 (The American Statistician 52:119) and Agresti & Min 2005 (Statistics in
Medicine 24:729) do for proportions and matched pairs; the quantile is Student's, and the weight costs a degree of
freedom. What that covers is in docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmops.errors import FmopsError
from fmops.evaluation.statistics import t_quantile

FEWEST_LABELS = 10
"""From here on the interval was seen to cover what it promises."""
_HUMAN, _JUDGE = (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0)
"""One pair of each kind."""


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
        human: scores by people, from 0 to 1.
        judge_on_human: the judge's scores of the same items, in the same order.
        judge: the judge's scores of the other items; they come from where the first ones come from. Fewer than two of
            them say nothing: the people's scores stand alone.
        alpha: of the two-sided interval.

    Raises:
        FmopsError: fewer than `FEWEST_LABELS` human scores, not one judge's score for each, or one beyond 0 and 1.
    """
    n, many = len(human), len(judge)
    if n != len(judge_on_human):
        raise FmopsError(f"{n} human scores and {len(judge_on_human)} of the judge: give one of each for every item.")
    if n < FEWEST_LABELS:
        raise FmopsError(
            f"{n} human scores, and {FEWEST_LABELS} are the least: with fewer the interval is not known to hold. "
            f"Label {FEWEST_LABELS - n} more."
        )
    outside = [score for score in (*human, *judge_on_human, *judge) if not 0 <= score <= 1]
    if outside:
        raise FmopsError(f"a score of {outside[0]:g}: scores lie from 0 to 1. Divide by the length of their scale.")
    together = _covariance(human, judge_on_human)
    people, seen = [*human, *_HUMAN], [*judge_on_human, *_JUDGE]
    weight, shift, variance = 0.0, 0.0, 0.0
    if together > 0 and many >= 2:
        # All of the judge's scores estimate its variance: it is the same judge on the same kind of item.
        every, others = [*seen, *judge], [*judge, *_JUDGE]
        weight = min(1.0, max(0.0, _covariance(people, seen) / ((1 + n / many) * _covariance(every, every))))
        shift = weight * _mean(judge)
        variance = weight**2 * _covariance(others, others) / many
    errors = [own - weight * other for own, other in zip(people, seen, strict=True)]
    variance += _covariance(errors, errors) * (len(errors) - 1) / (len(errors) - 2) / len(errors)
    middle, reach = _mean(errors) + shift, t_quantile(1 - alpha / 2, n - 2) * math.sqrt(variance)
    own = _covariance(human, human) * _covariance(judge_on_human, judge_on_human)
    return Powered(
        value=min(1.0, max(0.0, _mean(errors[:n]) + shift)),
        lower=max(0.0, middle - reach),
        upper=min(1.0, middle + reach),
        weight=weight,
        agreement=together / math.sqrt(own) if own > 0 else 0.0,
        labelled=n,
        unlabelled=many,
    )


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
