"""How far a prompt lies from what is usually asked: from its nearest neighbours among the reference's prompts.

Enters: codes, bits of which two prompts share the more the nearer their meanings are (`adapters/prompt_codes.py`).
Leaves: shares between 0 and 1. Refuses: nothing; too few neighbours say nothing.

The simplified local outlier factor (Breunig et al. 2000; Schubert, Zimek & Kriegel 2014) compares distances with those
among the neighbours: a wide topic is not far away because it is wide. In many dimensions it is larger in some topics
than in others all the same; so it is ranked among those of the prompts around, and says nothing when a known topic is
asked about more often, as it is every evening. Plain distances do (docs/log.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

NEIGHBOURS = 3
"""Distances are means over so many."""
AROUND = 30
"""A prompt is ranked among so many."""
MOST = 1000
"""Prompts of the reference that are remembered, about: a sample of a longer one."""

Code = str
"""Bits in hexadecimal."""


def strangeness(code: Code, known: tuple[Code, ...]) -> float | None:
    """The share of the nearest known prompts that lie nearer to theirs than this one does, in proportion to the place.

    None with too few known ones.
    """
    if len(known) <= NEIGHBOURS:
        return None
    bits, spread, factors = _neighbourhood(known)
    near = _nearest(int(code, 16), bits, AROUND)
    own = _factor(near, spread)
    return fmean(factors[place] < own for _, place in near)


@lru_cache(maxsize=2)
def _neighbourhood(known: tuple[Code, ...]) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Known codes as numbers, the mean distance of each to its neighbours, and its local outlier factor."""
    bits = tuple(int(code, 16) for code in known)
    # The nearest of all is the code itself: no two are equal.
    near = [_nearest(one, bits, NEIGHBOURS + 1)[1:] for one in bits]
    spread = tuple(_distance(each) for each in near)
    return bits, spread, tuple(_factor(each, spread) for each in near)


def _factor(near: Sequence[tuple[int, int]], spread: Sequence[float]) -> float:
    return _distance(near) / fmean(spread[place] for _, place in near[:NEIGHBOURS])


def _distance(near: Sequence[tuple[int, int]]) -> float:
    """In bits, and one more: what is asked again and again has distance 0."""
    return 1 + fmean(far for far, _ in near[:NEIGHBOURS])


def _nearest(code: int, bits: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Distance and place of the nearest; of equals the earliest."""
    return heapq.nsmallest(count, (((code ^ other).bit_count(), place) for place, other in enumerate(bits)))
