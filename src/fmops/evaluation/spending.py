"""Spending α over rounds: the same tests judge a stream of candidates, and each look costs.

Enters: the earlier rounds of a workspace, in order. Leaves: the level of the next one, and the wealth that is left.
Refuses: nothing. Rounds whose evidence was refused tested nothing and are not among them.

LORD++ (Ramdas, Yang, Wainwright & Jordan 2017, arXiv 1710.00499; Javanmard & Montanari 2018): the expected share of
false promotions among promotions stays at most α while p-values are valid given the past. Before the first promotion
the levels sum to less than α/2, so that a stream of equal models is promoted even once with probability at most α/2,
however its p-values depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from fmops.artifacts import Judged

EXPONENT = 1.6
"""Of the decay 1/j^1.6. A heavier first round than the paper's sequence: a project has tens of rounds, no thousands."""
_ZETA = 2.28576568
"""ζ(1.6), rounded up, so that the shares sum to at most 1."""
FIRST = 0.5
"""Share of α that may be spent before anything was promoted; a promotion earns the rest, later ones α each."""


def share(place: int) -> float:
    """γ_j, the part of a grant that the j-th round after it may use."""
    return 0.0 if place < 1 else place**-EXPONENT / _ZETA


def level(earlier: Sequence[Judged], alpha: float) -> float:
    """α_t of the next round."""
    now = len(earlier) + 1
    granted = FIRST * alpha * share(now)
    promoted = [place for place, tested in enumerate(earlier, start=1) if tested.promoted]
    for order, place in enumerate(promoted):
        granted += (alpha * (1 - FIRST) if order == 0 else alpha) * share(now - place)
    return granted


def wealth(tested: Sequence[Judged], alpha: float) -> float:
    """What was granted and is not spent yet."""
    promoted = sum(each.promoted for each in tested)
    granted = FIRST * alpha + (alpha * (1 - FIRST) if promoted else 0.0) + alpha * max(0, promoted - 1)
    return granted - sum(each.level for each in tested)
