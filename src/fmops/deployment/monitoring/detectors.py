"""Change detectors with a stated mean number of observations between two false alarms. Pure functions, frozen states.

Enters: bounded numbers, or any numbers, in the order in which they came. Leaves: states with a level.
Refuses: nothing; the caller alarms when the level reaches its threshold A.

An e-detector is a sum of e-processes, one started at each observation; in control its level minus the number of
observations has no positive drift, so the mean run to level A is at least A, whatever the dependence (Shin, Ramdas &
Rinaldo 2024, arXiv 2203.03532). Averages of e-detectors are e-detectors. The same sum over conformal test martingales
is Vovk's Shiryaev–Roberts procedure (Vovk et al. 2021, arXiv 2102.10439); harm rule: Podkopaev & Ramdas 2022 (arXiv
2110.06177).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from fmops.artifacts import Frozen
from fmops.deployment.evalues import FRACTIONS, Count, bet_factors, exact_upper, rate_bounds

JUMP = 0.01
"""How readily the conformal martingale changes its bet (the "simple jumper" of Vovk et al.)."""
BETS = (-1.0, 0.0, 1.0)
LARGEST = 1e12
"""Levels stop growing here: an alarm has been due for long."""


class Detector(Frozen):
    """Has the mean of values in [0, 1] risen above `null`? One sum for each size of bet; the level is their average."""

    null: float
    n: int = 0
    sums: tuple[float, ...] = (0.0,) * len(FRACTIONS)

    @property
    def level(self) -> float:
        """Alarm at A; the mean run to a false alarm is at least A."""
        return math.fsum(self.sums) / len(self.sums)

    def add(self, value: float) -> Detector:
        """M ← (M + 1)·(1 + λ(x − null)) for every λ."""
        factors = bet_factors(value, null=self.null, low=0.0, high=1.0, direction="above")
        sums = tuple(min((had + 1) * factor, LARGEST) for had, factor in zip(self.sums, factors, strict=True))
        return self.model_copy(update={"n": self.n + 1, "sums": sums})


class Shift(Frozen):
    """Has the distribution of a number changed? A conformal test martingale on its bins.

    Each value is ranked among all since the last reset, ties broken by chance: while values are exchangeable the ranks
    are independent and uniform. Bets are on low ranks, high ranks, or neither.
    """

    seen: dict[int, int] = Field(default={}, description="Values by bin.")
    n: int = 0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def level(self) -> float:
        """Alarm at A; the mean run to a false alarm is at least A."""
        return math.fsum(self.sums)

    def add(self, place: int, chance: float) -> Shift:
        """Add a value's bin; `chance` in [0, 1) must be independent of everything else, a digest of the trace's id."""
        seen = {**self.seen, place: self.seen.get(place, 0) + 1}
        above = sum(count for other, count in seen.items() if other > place)
        rank = (above + chance * seen[place]) / (self.n + 1)
        started = [had + 1 / len(BETS) for had in self.sums]
        total = math.fsum(started)
        mixed = [(1 - JUMP) * had + JUMP * total / len(BETS) for had in started]
        low, none, high = (min(had * (1 + bet * (rank - 0.5)), LARGEST) for had, bet in zip(mixed, BETS, strict=True))
        return self.model_copy(update={"seen": seen, "n": self.n + 1, "sums": (low, none, high)})


def risk_has_risen(reference: Count, now: Count, *, tolerance: float, alpha: float) -> bool:
    """Whether the risk in production is above the reference's by more than `tolerance` (Podkopaev & Ramdas 2022).

    The lower bound of production, which holds at all times at once, must pass the upper bound of the reference, whose
    size was fixed beforehand; each with probability 1 − alpha/2, so that P(ever wrongly true) ≤ alpha. It finds slow
    harm that no detector of changes sees.
    """
    return rate_bounds(now, alpha / 2)[0] > exact_upper(reference, alpha / 2) + tolerance


def population_stability(reference: Mapping[int, int], now: Mapping[int, int]) -> float:
    """Population stability index over shared bins, half a value added to each: a picture, never an alarm."""
    bins = sorted(reference.keys() | now.keys())
    expected, found = _shares(reference, bins), _shares(now, bins)
    return math.fsum((q - p) * math.log(q / p) for p, q in zip(expected, found, strict=True))


def kolmogorov_smirnov(reference: Mapping[int, int], now: Mapping[int, int]) -> float:
    """Largest distance of the two distribution functions: a picture, never an alarm."""
    total_a, total_b = sum(reference.values()), sum(now.values())
    if not total_a or not total_b:
        return 0.0
    below_a = below_b = worst = 0.0
    for place in sorted(reference.keys() | now.keys()):
        below_a += reference.get(place, 0) / total_a
        below_b += now.get(place, 0) / total_b
        worst = max(worst, abs(below_a - below_b))
    return worst


def _shares(counts: Mapping[int, int], bins: Sequence[int]) -> list[float]:
    total = sum(counts.values()) + len(bins) / 2
    return [(counts.get(place, 0) + 0.5) / total for place in bins]
