"""Evidence holds what it promises: closed forms, exact expectations, and simulations that could fail."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmops.deployment.evalues import (
    Betting,
    Count,
    RareEvents,
    TwoStreams,
    bet_factors,
    e_bh,
    log_mean,
    minimum_detectable,
    project,
    quantile_ranks,
    rate_bounds,
)

rates = st.floats(0.01, 0.99)


def binomial(n: int, k: int, rate: float) -> float:
    return math.comb(n, k) * rate**k * (1 - rate) ** (n - k)


def expectation(state: TwoStreams, n_a: int, n_b: int, rate_a: float, rate_b: float) -> float:
    """Of the e-value after one more block, summed over everything that can happen."""
    return math.fsum(
        binomial(n_a, i, rate_a)
        * binomial(n_b, j, rate_b)
        * math.exp(state.block(Count(events=i, n=n_a), Count(events=j, n=n_b)).log_e)
        for i, j in product(range(n_a + 1), range(n_b + 1))
    )


@settings(max_examples=60, deadline=None)
@given(
    rates, rates, st.sampled_from([0.0, 0.02, 0.2, -0.1]), st.sampled_from(["above", "below"]), st.integers(1, 6),
    st.integers(1, 4), st.integers(0, 20), st.integers(0, 20),
)  # fmt: skip
def test_a_block_can_be_expected_to_gain_nothing_under_the_null(
    rate_a, rate_b, margin, direction, n_a, n_b, seen_a, seen_b
):
    inside = rate_b <= rate_a + margin if direction == "above" else rate_b >= rate_a + margin
    if not inside:
        rate_b = min(max(rate_a + margin, 0.0), 1.0)  # the null's edge, where it is tightest
        if (rate_b - rate_a - margin > 1e-12) if direction == "above" else (rate_a + margin - rate_b > 1e-12):
            return  # the edge lies outside the square
    state = TwoStreams(margin=margin, direction=direction, a=Count(events=seen_a, n=20), b=Count(events=seen_b, n=20))
    assert expectation(state, n_a, n_b, rate_a, rate_b) <= 1 + 1e-9


def test_a_block_can_be_expected_to_gain_under_harm():
    state = TwoStreams(a=Count(events=2, n=20), b=Count(events=8, n=20))
    assert expectation(state, 5, 5, 0.1, 0.4) > 1.1


def test_without_a_margin_the_null_is_the_pooled_rate():
    assert project(0.1, 0.4, 30, 10, 0.0) == pytest.approx((30 * 0.1 + 10 * 0.4) / 40)


def test_the_projection_is_the_nearest_point_of_the_line():
    def distance(t: float) -> float:
        def kl(p: float, q: float) -> float:
            return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

        return 7 * kl(0.05, t) + 3 * kl(0.3, t + 0.1)

    found = project(0.05, 0.3, 7, 3, 0.1)
    assert distance(found) <= min(distance(found + step) for step in (-1e-4, -1e-6, 1e-6, 1e-4))


def test_one_rare_event_on_the_canary_weighs_what_the_closed_form_says():
    for share in (0.01, 0.1, 0.5):
        assert math.exp(RareEvents().add(share, 1, 1).log_e) == pytest.approx((1 + share) / 2 / share)


def test_rare_events_gain_nothing_under_the_share_and_much_above_it():
    share, n = 0.1, 12
    states = [RareEvents().add(share, k, n) for k in range(n + 1)]
    expected = math.fsum(binomial(n, k, share) * math.exp(states[k].log_e) for k in range(n + 1))
    assert expected == pytest.approx(1)
    assert states[6].log_e > math.log(20)
    # Two shares multiply, and each is remembered.
    both = states[3].add(0.5, 2, 3)
    assert both.segments == ((share, 3, 12), (0.5, 2, 3))
    assert both.log_e == pytest.approx(states[3].log_e + RareEvents().add(0.5, 2, 3).log_e)


def test_bets_on_bounded_values_are_fair_and_can_never_go_broke():
    for direction in ("above", "below"):
        for null in (-0.2, 0.0, 0.3):
            for point in (-1.0, 1.0):
                assert min(bet_factors(point, null=null, low=-1, high=1, direction=direction)) > 0
            # A coin on ±1 with exactly the null's mean.
            heads = (1 + null) / 2
            up = bet_factors(1.0, null=null, low=-1, high=1, direction=direction)
            down = bet_factors(-1.0, null=null, low=-1, high=1, direction=direction)
            for win, lose in zip(up, down, strict=True):
                assert heads * win + (1 - heads) * lose == pytest.approx(1)
    with pytest.raises(ValueError, match=r"1.5 is not between -1 and 1"):
        bet_factors(1.5, null=0, low=-1, high=1, direction="above")


def test_paired_differences_find_harm_and_certify_its_absence():
    chance = random.Random(1)
    harm, fine = Betting(null=0.0), Betting(null=0.05, direction="below")
    for _ in range(400):
        harm = harm.add(float(chance.random() < 0.2) - float(chance.random() < 0.05))
        fine = fine.add(float(chance.random() < 0.01) - float(chance.random() < 0.01))
    assert harm.log_e > math.log(20)
    assert fine.log_e > math.log(20)


def test_the_average_and_the_culprits():
    assert log_mean([math.log(2), math.log(4)]) == pytest.approx(math.log(3))
    assert log_mean([]) == 0
    logs = {"empty": math.log(200), "refused": math.log(45), "failed": 0.0, "repeated": -3.0}
    assert e_bh(logs, 0.05) == ("empty", "refused")  # 200 ≥ 4/(0.05·2) and 45 ≥ 40
    assert e_bh({**logs, "refused": math.log(39)}, 0.05) == ("empty",)
    assert e_bh(dict.fromkeys(logs, 0.0), 0.05) == ()


def test_rates_stay_inside_their_bounds_at_all_times():
    missed = 0
    for seed in range(200):
        chance, count = random.Random(seed), Count()
        for step in range(1, 301):
            count = count + Count(events=int(chance.random() < 0.1), n=1)
            if step % 10 == 0:
                low, high = rate_bounds(count, 0.05)
                if not low <= 0.1 <= high:
                    missed += 1
                    break
    assert missed <= 17  # P(Binomial(200, 0.05) > 17) = 0.014; the bounds' own rate is lower
    low, high = rate_bounds(Count(events=50, n=500), 0.05)
    assert 0.05 < low < 0.1 < high < 0.16
    assert rate_bounds(Count(), 0.05) == (0.0, 1.0)


def test_quantiles_lie_between_their_ranks_at_all_times():
    missed = 0
    for seed in range(150):
        chance, values = random.Random(1000 + seed), []
        for _ in range(20):
            values = sorted([*values, *(chance.random() for _ in range(25))])
            low, high = quantile_ranks(len(values), 0.9, 0.05)
            if (low and values[low - 1] > 0.9) or (high <= len(values) and values[high - 1] < 0.9):
                missed += 1
                break
    assert missed <= 14  # P(Binomial(150, 0.05) > 14) = 0.01
    low, high = quantile_ranks(5000, 0.95, 0.05)
    assert 4650 < low < 4750 < high < 4850
    assert quantile_ranks(3, 0.95, 0.05)[1] == 4


def test_the_minimum_detectable_harm_shrinks_with_traffic_and_is_found():
    few = minimum_detectable(0.05, a=3000, b=30, alpha=0.05, signals=8)
    many = minimum_detectable(0.05, a=1500, b=1500, alpha=0.05, signals=8)
    assert few > 0.2 > 0.06 > many > 0.02
    assert minimum_detectable(0.05, a=100, b=2, alpha=0.05, signals=8) == math.inf
    found = 0
    for seed in range(60):
        chance, state = random.Random(seed), TwoStreams()
        for _ in range(100):
            a = Count(events=sum(chance.random() < 0.05 for _ in range(15)), n=15)
            b = Count(events=sum(chance.random() < 0.05 + many for _ in range(15)), n=15)
            state = state.block(a, b)
            if state.log_e >= math.log(8 / 0.05):
                found += 1
                break
    assert found >= 40  # stated power 0.8: P(Binomial(60, 0.8) < 40) = 0.005


def test_looking_often_does_not_raise_the_false_alarms():
    false = 0
    for seed in range(200):
        chance, state = random.Random(seed), TwoStreams()
        for _ in range(80):
            a = Count(events=sum(chance.random() < 0.1 for _ in range(20)), n=20)
            b = Count(events=sum(chance.random() < 0.1 for _ in range(5)), n=5)
            state = state.block(a, b)
            if state.log_e >= math.log(20):
                false += 1
                break
    assert false <= 17


def test_an_equal_stream_is_certified_within_the_margin_soon():
    needed = []
    for seed in range(15):
        chance, state = random.Random(seed), TwoStreams(margin=0.05, direction="below")
        while state.log_e < math.log(20) and state.b.n < 2000:
            a = Count(events=sum(chance.random() < 0.02 for _ in range(5)), n=5)
            b = Count(events=sum(chance.random() < 0.02 for _ in range(5)), n=5)
            state = state.block(a, b)
        needed.append(state.b.n)
    assert sorted(needed)[7] < 180
