"""Evidence that may be looked at whenever one likes: e-values, e-processes, time-uniform bounds. Pure functions.

Enters: counts and bounded numbers, in the order in which they came. Leaves: frozen states and their log e-values.
Refuses: nothing; a null hypothesis is rejected by the caller, when e ≥ 1/α.

An e-process has expectation at most 1 under the null at every stopping time, so P(it ever reaches 1/α) ≤ α (Ville
1939). Averages of e-processes are e-processes (Vovk & Wang 2021). Sources: Turner, Ly & Grünwald 2024 (arXiv
2106.02693, two streams), Turner & Grünwald 2023 (arXiv 2203.09785, margins), Waudby-Smith & Ramdas 2024 (arXiv
2010.09686, betting), Howard & Ramdas 2022 (arXiv 1906.09712, quantiles), Wang & Ramdas 2022 (arXiv 2009.02824, e-BH).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from fmops.artifacts import Frozen

Direction = Literal["above", "below"]
EXCESSES = (0.01, 0.03, 0.1, 0.3)
"""Sizes of harm that are bet on, beside the size that the data show so far."""
GAINS = (0.0, 0.5)
"""When certifying "not worse by δ": bets that the truth lies at these shares of δ, beside what the data show."""
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Of the largest bet on bounded values that can never lose everything."""
EDGE = 1e-4
"""Plug-in rates stay this far from 0 and 1: one surprise must not cost infinitely much."""


class Count(Frozen):
    """How often something happened in how many answers."""

    events: int = 0
    n: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(events=self.events + other.events, n=self.n + other.n)

    @property
    def guess(self) -> float:
        """The rate with half an event on either side (Krichevsky & Trofimov 1981), away from 0 and 1."""
        return min(max((self.events + 0.5) / (self.n + 1), EDGE), 1 - EDGE)


class TwoStreams(Frozen):
    """Evidence against "b's rate is at most a's + margin" (`above`), or at least that (`below`), block by block.

    Rates may change from block to block; within a block, and given what came before, each answer of a stream has the
    stream's rate. Each component bets on one alternative, chosen before the block is seen.
    """

    margin: float = 0.0
    direction: Direction = "above"
    a: Count = Count()
    b: Count = Count()
    logs: tuple[float, ...] = ()
    """Log e-value of each component."""

    @property
    def log_e(self) -> float:
        """Natural logarithm of the mixture's e-value."""
        return log_mean(self.logs)

    def block(self, a: Count, b: Count) -> TwoStreams:
        """Play one block. Its sizes must not depend on what happened in it."""
        bets = self._bets()
        logs = self.logs or (0.0,) * len(bets)
        if a.n and b.n:
            logs = tuple(log + self._gain(bet, a, b) for log, bet in zip(logs, bets, strict=True))
        return self.model_copy(update={"a": self.a + a, "b": self.b + b, "logs": logs})

    def _bets(self) -> list[tuple[float, float] | None]:
        """Rates of (a, b) under each alternative; None where it lies inside the null: no bet, e = 1."""
        a, b = self.a.guess, self.b.guess
        if self.direction == "above":
            rates = [b, *(a + self.margin + excess for excess in EXCESSES)]
            return [(a, _inside(rate)) if _inside(rate) > a + self.margin else None for rate in rates]
        rates = [b, *(a + self.margin * gain for gain in GAINS)]
        return [(a, _inside(rate)) if _inside(rate) < a + self.margin else None for rate in rates]

    def _gain(self, bet: tuple[float, float] | None, a: Count, b: Count) -> float:
        if bet is None:
            return 0.0
        null_a = project(*bet, a.n, b.n, self.margin)
        return _log_ratio(bet[0], null_a, a) + _log_ratio(bet[1], null_a + self.margin, b)


def project(rate_a: float, rate_b: float, n_a: int, n_b: int, margin: float) -> float:
    """a's rate in the point of the line `b = a + margin` nearest to the alternative (reverse information projection).

    It minimises n_a·KL(rate_a‖t) + n_b·KL(rate_b‖t + margin). The likelihood ratio of a block against it is an
    e-variable: its expectation is Π_j (1 + (θ_j − θ°_j)(θ'_j − θ°_j)/(θ°_j(1 − θ°_j)))^{n_j}; by log(1 + x) ≤ x the
    logarithm is at most minus the divergence's slope from θ° towards (θ_a, θ_b), and that slope is nowhere negative
    in a convex null, since θ° is its nearest point.
    """
    if margin == 0:
        return (n_a * rate_a + n_b * rate_b) / (n_a + n_b)
    low, high = sorted((rate_a, rate_b - margin))
    low, high = max(low, -margin, 0.0), min(high, 1 - margin, 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        shifted = middle + margin
        slope = n_a * (rate_a - middle) / (middle * (1 - middle)) + n_b * (rate_b - shifted) / (shifted * (1 - shifted))
        low, high = (middle, high) if slope > 0 else (low, middle)
        if high - low < 1e-12:
            break
    return (low + high) / 2


class RareEvents(Frozen):
    """Evidence that rare events fall on the canary more often than its share of the traffic.

    Given an event, it falls on the canary with the probability of its share when the canary is no worse. The
    alternative's prior is uniform above the share. A new share opens a new segment; segments multiply.
    """

    segments: tuple[tuple[float, int, int], ...] = ()
    """Share, events of the canary, events in all."""

    def add(self, share: float, canary: int, total: int) -> RareEvents:
        """Count events that came while the canary had `share` of the traffic."""
        if not total:
            return self
        before = self.segments
        if before and before[-1][0] == share:
            _, had, of = before[-1]
            return RareEvents(segments=(*before[:-1], (share, had + canary, of + total)))
        return RareEvents(segments=(*before, (share, canary, total)))

    @property
    def log_e(self) -> float:
        """∫_{θ>ρ} θ^K (1−θ)^{N−K} dθ/(1−ρ) ÷ ρ^K (1−ρ)^{N−K}, in logarithms, summed over segments."""
        return math.fsum(_rare(*segment) for segment in self.segments if 0 < segment[0] < 1)


def _rare(share: float, canary: int, total: int) -> float:
    from scipy.special import betaincc

    others = total - canary
    above = float(betaincc(canary + 1, others + 1, share))
    if above <= 0:
        return -1e3
    integral = _log_beta(canary + 1, others + 1) + math.log(above) - math.log1p(-share)
    return integral - canary * math.log(share) - others * math.log1p(-share)


class Betting(Frozen):
    """Evidence that bounded values have a mean above (`above`) or below `null`, whatever their distribution.

    Wealth Π(1 + λ(x − null)) for several fixed λ, averaged (Waudby-Smith & Ramdas 2024, section 4).
    """

    null: float
    low: float = -1.0
    high: float = 1.0
    direction: Direction = "above"
    n: int = 0
    total: float = 0.0
    logs: tuple[float, ...] = (0.0,) * len(FRACTIONS)

    @property
    def log_e(self) -> float:
        """Natural logarithm of the mixture's e-value."""
        return log_mean(self.logs)

    def add(self, value: float) -> Betting:
        """Play one value in [low, high]."""
        factors = bet_factors(value, null=self.null, low=self.low, high=self.high, direction=self.direction)
        logs = tuple(log + math.log(factor) for log, factor in zip(self.logs, factors, strict=True))
        return self.model_copy(update={"n": self.n + 1, "total": self.total + value, "logs": logs})


def bet_factors(value: float, *, null: float, low: float, high: float, direction: Direction) -> tuple[float, ...]:
    """1 + λ(x − null) for each fraction of the largest λ; each has expectation at most 1 under the null.

    Raises:
        ValueError: the value is not between `low` and `high`; the guarantee would be lost.
    """
    if not low <= value <= high:
        raise ValueError(f"{value} is not between {low} and {high}")
    room, gain = (null - low, value - null) if direction == "above" else (high - null, null - value)
    if room <= 0:
        return (1.0,) * len(FRACTIONS)
    return tuple(1 + fraction / room * gain for fraction in FRACTIONS)


def log_mean(logs: Sequence[float]) -> float:
    """log of the mean of exp(logs): the average of e-values; nothing seen is no evidence, 0."""
    if not logs:
        return 0.0
    top = max(logs)
    return top + math.log(math.fsum(math.exp(log - top) for log in logs) / len(logs))


def e_bh(log_e: Mapping[str, float], alpha: float) -> tuple[str, ...]:
    """Names that stand out, with a false discovery rate of at most `alpha` under any dependence (e-BH).

    The k largest are named, for the largest k whose k-th e-value is at least K/(αk).
    """
    ranked = sorted(log_e, key=lambda name: -log_e[name])
    named = [k for k, name in enumerate(ranked, 1) if log_e[name] >= math.log(len(ranked) / (alpha * k))]
    return tuple(ranked[: named[-1]]) if named else ()


def rate_bounds(count: Count, alpha: float) -> tuple[float, float]:
    """Bounds of a rate that hold at all times at once with probability 1 − alpha (Robbins 1970, uniform mixture)."""
    if not count.n:
        return 0.0, 1.0
    mixture = _log_beta(count.events + 1, count.n - count.events + 1)
    limit, centre = math.log(1 / alpha), count.events / count.n

    def excluded(rate: float) -> bool:
        return mixture - _log_likelihood(rate, count) >= limit

    low = 0.0 if not count.events else _edge(excluded, outside=0.0, inside=centre)
    high = 1.0 if count.events == count.n else _edge(excluded, outside=1.0, inside=centre)
    return low, high


def exact_upper(count: Count, alpha: float) -> float:
    """Clopper & Pearson's one-sided upper bound, for a number of answers fixed beforehand."""
    from scipy.special import betaincinv

    if count.events >= count.n:
        return 1.0
    return float(betaincinv(count.events + 1, count.n - count.events, 1 - alpha))


def _edge(excluded: Callable[[float], bool], *, outside: float, inside: float) -> float:
    for _ in range(50):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if excluded(middle) else (outside, middle)
    return outside


def quantile_ranks(n: int, quantile: float, alpha: float) -> tuple[int, int]:
    """Ranks (from 1) of two order statistics that enclose a quantile at all times at once.

    Rank 0 stands for minus infinity, n + 1 for infinity. How many of n values lie at or below the quantile is a
    Bernoulli count with a known rate: the mixture of `rate_bounds` tells which are possible (Howard & Ramdas 2022).
    """
    limit = math.log(1 / alpha)

    def possible(below: int) -> bool:
        count = Count(events=below, n=n)
        return _log_beta(below + 1, n - below + 1) - _log_likelihood(quantile, count) < limit

    centre = round(quantile * n)
    low, high = 0, centre
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if possible(middle) else (middle + 1, high)
    bottom = low
    low, high = centre, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if possible(middle) else (low, middle - 1)
    return bottom, low + 1


def minimum_detectable(rate: float, *, a: int, b: int, alpha: float, signals: int, power: float = 0.8) -> float:
    """Smallest increase of `rate` in stream b that is found with `power` after `a` and `b` answers; inf if none is.

    The log e-value is near normal with mean Σ n·KL and the variance of the log likelihood ratio; it must reach
    log(signals·components/alpha), since the evidence is averaged over signals and components.
    """
    from statistics import NormalDist

    if not a or not b:
        return math.inf
    need = math.log(signals * (len(EXCESSES) + 1) / alpha)
    z = NormalDist().inv_cdf(power)
    start = min(max(rate, EDGE), 1 - 2 * EDGE)

    def found(harm: float) -> bool:
        bad = start + harm
        null = project(start, bad, a, b, 0.0)
        mean = a * _divergence(start, null) + b * _divergence(bad, null)
        variance = a * _spread(start, null) + b * _spread(bad, null)
        return mean - z * math.sqrt(variance) >= need

    low, high = 0.0, 1 - EDGE - start
    if not found(high):
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def _inside(rate: float) -> float:
    return min(max(rate, EDGE), 1 - EDGE)


def _log_ratio(rate: float, null: float, count: Count) -> float:
    happened = count.events * math.log(rate / null) if count.events else 0.0
    return happened + (count.n - count.events) * math.log((1 - rate) / (1 - null))


def _log_likelihood(rate: float, count: Count) -> float:
    misses = count.n - count.events
    if (rate <= 0 and count.events) or (rate >= 1 and misses):
        return -math.inf
    happened = count.events * math.log(rate) if count.events else 0.0
    return happened + (misses * math.log1p(-rate) if misses else 0.0)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _divergence(rate: float, null: float) -> float:
    return rate * math.log(rate / null) + (1 - rate) * math.log((1 - rate) / (1 - null))


def _spread(rate: float, null: float) -> float:
    return rate * (1 - rate) * math.log(rate * (1 - null) / (null * (1 - rate))) ** 2
