"""The gate's arithmetic: errors, intervals, corrections, against closed forms and simulation."""

from __future__ import annotations

import math
import random
import statistics as standard

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmops.evaluation import statistics

ALPHA = 0.05
Z = statistics.normal_quantile(1 - ALPHA)
values = st.lists(st.floats(-10, 10), min_size=2, max_size=60)


def clopper_pearson_lower(hits: int, n: int, level: float = 0.999) -> float:
    """What the true rate is at least, with this confidence."""
    from scipy.special import betaincinv

    return 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, 1 - level))


@given(values)
def test_without_clusters_the_error_is_the_textbooks(scores):
    mean = statistics.clustered_mean(scores, [str(index) for index in range(len(scores))])
    expected = standard.stdev(scores) / math.sqrt(len(scores))
    assert mean.standard_error == pytest.approx(expected, abs=1e-9)


@given(values, st.integers(2, 5))
def test_asking_the_same_question_again_teaches_nothing(scores, times):
    once = statistics.clustered_mean(scores, [str(index) for index in range(len(scores))])
    again = statistics.clustered_mean(scores * times, [str(index) for index in range(len(scores))] * times)
    assert again.standard_error == pytest.approx(once.standard_error, abs=1e-9)
    assert again.clusters == len(scores)


def test_one_cluster_bounds_nothing():
    mean = statistics.clustered_mean([0.1, 0.2, 0.3], ["a", "a", "a"])
    assert statistics.one_sided_bounds(mean, ALPHA) == (-math.inf, math.inf)
    assert statistics.improvement_p(mean) == 1.0


def test_few_documents_widen_the_interval():
    few = statistics.Mean(0.0, 1.0, 5, 5)
    assert statistics.one_sided_bounds(few, ALPHA)[1] == pytest.approx(2.1318, abs=1e-3)  # t with 4 degrees
    many = statistics.Mean(0.0, 1.0, 10_000, 10_000)
    assert statistics.one_sided_bounds(many, ALPHA)[1] == pytest.approx(Z, abs=1e-3)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60))
def test_score_bounds_are_where_the_score_is_z(won, lost, ties):
    n = won + lost + ties
    lower, upper = statistics.tango_bounds(won, lost, n, ALPHA)
    assert -1 <= lower <= (won - lost) / n <= upper <= 1
    assert statistics.tango_score(won, lost, n, lower) == pytest.approx(Z, abs=1e-4)
    assert statistics.tango_score(won, lost, n, upper) == pytest.approx(-Z, abs=1e-4)
    assert statistics.tango_bounds(lost, won, n, ALPHA) == pytest.approx((-upper, -lower), abs=1e-6)


@pytest.mark.parametrize("n", [5, 30, 500])
def test_agreement_on_every_item_still_leaves_doubt(n):
    lower, upper = statistics.tango_bounds(0, 0, n, ALPHA)
    assert upper == pytest.approx(Z**2 / (n + Z**2), abs=1e-6)  # Tango's closed form without discordant pairs
    assert lower == pytest.approx(-upper, abs=1e-6)


def test_score_bounds_miss_as_rarely_as_they_say():
    rng, n, trials = random.Random(1), 60, 1500
    won_rate, lost_rate = 0.05, 0.15
    missed = 0
    for _ in range(trials):
        draws = [rng.random() for _ in range(n)]
        won = sum(draw < won_rate for draw in draws)
        lost = sum(won_rate <= draw < won_rate + lost_rate for draw in draws)
        missed += statistics.tango_bounds(won, lost, n, ALPHA)[0] > won_rate - lost_rate
    # An asymptotic interval: a tenth of slack on the nominal level at n = 60.
    assert clopper_pearson_lower(missed, trials) <= ALPHA * 1.1


def test_mcnemar_is_the_fair_coin():
    assert statistics.mcnemar_p(8, 2) == pytest.approx((45 + 10 + 1) / 1024)
    assert statistics.mcnemar_p(0, 0) == 1.0
    assert statistics.mcnemar_p(0, 7) == 1.0


def test_holm_stops_at_the_first_that_fails():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}, 0.05) == ("a",)
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.02}, 0.05) == ("a", "c", "b")
    assert statistics.holm({}, 0.05) == ()


def test_power_is_what_the_design_states():
    # 20 % disagreement, 2 points, 80 % power: about 3,100 items.
    assert 3050 <= statistics.required_items(0.02, disagreement=0.2) <= 3150
    n = statistics.required_items(0.05, disagreement=0.2, families=6)
    assert statistics.minimum_detectable(n, disagreement=0.2, families=6) == pytest.approx(0.05, rel=1e-3)


def test_an_equal_model_passes_as_often_as_planned():
    rng, n, trials = random.Random(2), 300, 800
    margin = statistics.minimum_detectable(n, disagreement=0.2, power=0.8)
    passed = 0
    for _ in range(trials):
        draws = [rng.random() for _ in range(n)]
        won, lost = sum(draw < 0.1 for draw in draws), sum(0.1 <= draw < 0.2 for draw in draws)
        passed += statistics.tango_bounds(won, lost, n, ALPHA)[0] > -margin
    assert 0.75 <= passed / trials <= 0.86
